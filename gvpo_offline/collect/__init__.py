"""Making datasets: importing logs, sampling responses, scoring references.

`formats` turns one producer's rows into fragments of groups, `sources` reads files, `regroup`
brings the fragments of a group together without holding the log in memory, `assemble` makes them
groups, and `importer` is the whole stage. `sample` draws responses and ends in the same importer.
`reward` and `reference` score what is there, on an `engine`; `merge` joins datasets and rewrites
their files.
"""
