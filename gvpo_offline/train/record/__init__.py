"""What a run writes and prints while it trains: JSON lines, progress, loggers."""
