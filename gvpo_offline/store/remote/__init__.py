"""Datasets at a URL: byte ranges through fsspec, tried again where the network fails, and kept in a
bounded local cache.

Bottom up: `ranges` is arithmetic, `folder` makes requests, `cache` keeps what came, `storage` is
what a dataset reads through.
"""
