"""Selection of the groups of a dataset, and of the responses in them, that a run uses.

`select` combines the conditions. `predicate` parses `where`, `columns` computes the columns that it
may name, `where` evaluates it; `responses` selects within groups.
"""
