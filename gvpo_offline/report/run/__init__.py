"""The page of training runs, from the files in their folders.

`files` reads a run; `facts` derives what the page and its JSON say; `curves`, `charts`, `settings`,
`answers`, `residuals`, `tune` make the parts; `build` puts them together.
"""
