"""From groups to log-probs: layouts, the forward pass over them, the model itself.

`layout` lays groups out, `forward` runs a model over a layout, `engine` does so within the budget
of tokens and adds up gradients, `probe` chooses how. Trainer, evaluation and reference stage go
through one engine, so that log-ratios are zero where policy and reference are one.
"""
