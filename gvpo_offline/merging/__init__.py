"""Merges datasets and compacts a dataset, with all sidecars of the groups.

`inputs` opens datasets and finds the rewards and references that all of them have, `names` maps
prompts to group ids, `layout` finds the files that need no rewriting, `store.spill` partitions rows
on disk, `plan` selects the responses of each group, `store.response_index` takes them from
columns, `rewrite` writes shards, `work` locks and cleans the folder, and `stages` holds `merge` and
`compact`.
"""
