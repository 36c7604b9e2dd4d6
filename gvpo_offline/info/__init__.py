"""Descriptions of datasets, as `ls` prints them and the card on the hub shows them."""
