"""Datasets at a URL: byte ranges through fsspec, with retries and a bounded local cache.

Bottom up: `ranges` computes byte ranges, `folder` makes requests, `cache` keeps their bytes,
`shard` is one Parquet file, and `storage` is the dataset.
"""
