"""Fragments to datasets: checked, brought together, tokenised, written, published."""
