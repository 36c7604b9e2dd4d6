"""The group store: Parquet shards, row-aligned sidecars, and the manifest that lists them.

Bottom up: `manifest` lists the files of a dataset, `commit` writes files atomically, `parquet`
encodes them, `dataset` reads, `writer` writes, `survey` counts.
"""
