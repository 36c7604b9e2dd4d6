"""Subcommands of `gvpo-offline`: their settings, and the runs of `train`, `tune` and `evaluate`."""
