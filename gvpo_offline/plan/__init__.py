"""Bytes, operations and seconds of a training step, from shapes alone. Loads no torch."""
