"""What a page holds (`blocks.py`), and its HTML: one file that needs no network."""
