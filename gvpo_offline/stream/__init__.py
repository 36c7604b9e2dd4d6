"""From files to steps: which groups an optimizer step takes, and how ranks share them.

`order` is arithmetic on numbers of groups, `plan` on their lengths; `steps` reads. Nothing above
knows about files, nothing below about ranks.
"""
