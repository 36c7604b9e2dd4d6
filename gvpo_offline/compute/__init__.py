"""Log-probs of groups: input layouts, the forward pass over a layout, model loading.

`layout` arranges groups as model input, `forward` runs a model over a layout, `engine` keeps to the
token budget and accumulates gradients, `probe` chooses the layout and the kernels. Training,
evaluation and the reference stage use the same engine, so that log-ratios are zero where policy and
reference are the same model.
"""
