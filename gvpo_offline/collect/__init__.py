"""Making datasets: importing logs now; sampling, rewards and references as they are added.

`formats` turns one producer's rows into fragments of groups, `sources` reads files, `regroup`
brings the fragments of a group together without holding the log in memory, `assemble` makes them
groups, and `importer` is the whole stage. `merge` joins datasets and rewrites their files.
"""
