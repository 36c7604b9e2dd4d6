"""What is wrong or doubtful in a dataset: findings with severity, count, examples and remedy."""
