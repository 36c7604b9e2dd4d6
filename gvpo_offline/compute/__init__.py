"""From groups to log-probs: tensors of a micro-batch, the forward pass, the model itself.

`batch` lays groups out, `logprobs` runs the model over the layout, `model` loads and identifies the
model. The trainer and the reference stage go through the same two functions, so that log-ratios are
zero where policy and reference are one.
"""
