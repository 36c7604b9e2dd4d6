"""Joining datasets and rewriting one: groups and all their sidecars travel together, row by row.

`inputs` opens datasets and says what they have in common, `names` finds groups of one prompt,
`layout` which files stay as they are, `spill` brings the rows of a group together on disk, `plan`
says which responses make up each group, `store.pick` takes them from any column, `rewrite`
writes shards, `work` keeps the folder in order, and `stages` are merge and compact as a whole.
"""
