"""Code that log formats share: column checks, parts of rewards, rows of trainer logs."""
