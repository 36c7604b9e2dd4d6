"""The commands that need more than one call: from settings to a finished run."""
