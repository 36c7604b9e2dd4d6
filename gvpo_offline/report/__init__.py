"""Numbers and texts about what is on disk, from files alone."""
