"""From datasets to optimizer steps: which groups a step takes, and how ranks share them.

`selecting` chooses groups and responses; a `DatasetView` is a dataset with such a selection.
`order` and `mix` compute the order of training from numbers of groups, `plan` cuts a step into
micro-batches by lengths, `steps` reads the groups, and `ahead` prefetches steps.
"""
