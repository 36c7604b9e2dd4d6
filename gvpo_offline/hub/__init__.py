"""Datasets to and from the Hugging Face Hub: the same files, the same manifests, a card beside
them. Nothing here knows what a dataset is for.
"""
