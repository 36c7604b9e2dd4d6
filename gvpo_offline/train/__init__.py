"""Training: a transformers Trainer whose batches are groups.

`trainer`: `GVPOTrainer`; `objective`: the loss of a micro-batch; `engine`: the compute engine.
`settings`, `config`: settings; `data`: datasets and steps of a run; `identity`: what a resumed run
must share. `preflight`: checks before the first step; `evaluation`: metrics of held-out groups;
`callbacks`: warnings and epochs. `checkpoint`, `checkpointing`, `resharding`: sealed checkpoints;
`distributed`: FSDP2, DDP and DeepSpeed.
"""
