"""The group store: Parquet shards, row-aligned sidecars, and the manifest that names them.

Bottom up: `commit` writes files that are whole or absent, `manifest` says which belong together,
`parquet` is the encoding, `dataset` reads, `writer` writes, `survey` counts.
"""
