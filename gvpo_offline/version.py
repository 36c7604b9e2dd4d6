"""The versions of the package and of what it writes."""

__version__ = "0.1.0"

IMPORT_VERSION = 3
"""Version of how `import` and `sample` make groups of a log. Raise it whenever the same inputs and
settings would give other token ids, other groups or other bytes than before. The manifest records
it, and training warns about a dataset of an earlier version."""
