"""Making datasets: importing logs, sampling responses, scoring them, merging what there is.

`reading` opens files, `formats` turns one producer's rows into fragments of groups (with `shapes`,
what formats share), and `importing` makes a dataset of the fragments. `sample` draws responses and
ends in the same importer. `reward` and `reference` score what is there; these three are stages that
an `engine` runs, and whoever asks a server does it through `server`. `merge` joins datasets and
rewrites their files.
"""
