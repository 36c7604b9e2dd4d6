"""Imports logs of scored responses: read, check, group, tokenise, write and publish a dataset."""
