"""What formats of logs have in common: values, parts of rewards, the shapes of trainers' logs."""
