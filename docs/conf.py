"""Configuration of the documentation site (Sphinx with MyST); `make docs` builds it.

Every warning is an error: a link to a page, heading or file that does not exist fails the build.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]

from gvpo_offline.version import __version__  # noqa: E402

project = "gvpo_offline"
author = "the gvpo_offline authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated", "repository"]
exclude_patterns = ["_ext"]
root_doc = "index"
language = "en"

# Files of the repository that are no pages are linked there. Set DOCS_REPOSITORY for a fork.
repository_url = os.environ.get("DOCS_REPOSITORY", "https://github.com/OWNER/gvpo_offline")

# The navigation, by page. It is not written into the pages, where GitHub would show it as code.
toctrees = {
    "index": {
        "Start": [
            "start/install",
            "start/quickstart",
            "start/tutorial",
            "start/your-logs",
            "start/from-trl",
            "start/from-verl",
            "start/loop",
        ],
        "How to": [
            "howto/inputs",
            "howto/formats",
            "howto/formats-hub",
            "howto/log-values",
            "howto/tokens",
            "howto/sampling",
            "howto/rewards",
            "howto/reference",
            "howto/merging",
            "howto/growing",
            "howto/show",
            "howto/report",
            "howto/run-report",
            "howto/validate",
            "howto/leftovers",
            "howto/selecting",
            "howto/mixing",
            "howto/remote",
            "howto/sharing",
            "howto/tuning",
            "howto/watching",
            "howto/sampled-evaluation",
            "howto/order",
            "howto/plan",
            "howto/distributed",
            "howto/preemption",
            "howto/adapters",
            "howto/models",
            "howto/serving",
            "howto/troubleshooting",
        ],
        "Reference": ["reference/index", "reference/losses", "reference/limits"],
        "Theory": ["theory/objective", "theory/architecture", "theory/compute", "theory/order"],
        "Evidence": ["evidence/results", "evidence/convergence", "evidence/scale", "reliability"],
        "Appendix": [
            "appendix/results-study",
            "appendix/alternatives",
            "appendix/documentation",
        ],
    },
    "reference/index": {
        "": ["generated/commands", "generated/api", "generated/files"],
    },
}

myst_heading_anchors = 4  # the anchors that GitHub gives headings
myst_enable_extensions = []

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
smartquotes_action = "D"  # dashes only, which docstrings' parameters have; quotes stay as typed
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types in signatures; many belong to other packages

html_theme = "furo"
html_title = f"gvpo_offline {release}"
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
