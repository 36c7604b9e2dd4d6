"""Pages and JSON files that describe a dataset or runs, for a person to look at."""
