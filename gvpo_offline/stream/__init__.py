"""From files to steps: which groups an optimizer step takes, and how ranks share them.

`selecting` finds the groups that take part, and a `DatasetView` is a dataset seen so; `order` and `mix`
are arithmetic on numbers of groups, `plan` on their lengths; `steps` reads, and `ahead` before it
is asked. Nothing above knows about files, nothing below about ranks.
"""
