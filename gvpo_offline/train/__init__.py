"""Training: transformers' Trainer on groups, and what surrounds a run.

`config`, `data` and `identity` say what a run is; `preflight` looks before the first step,
`evaluation`, `meters` and `epochs` count, `watch` warns, `checkpoint` and `sealing` keep;
`together`, `distributed` and `elastic` are for many ranks; `trainer` is the run.
"""
