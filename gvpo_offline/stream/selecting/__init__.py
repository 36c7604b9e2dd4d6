"""Which groups of a dataset take part in a run, and with which of their responses.

`select` puts the conditions together; `where` asks a predicate (`predicate` parses it, `columns` is
what it may name), `responses` chooses within groups.
"""
