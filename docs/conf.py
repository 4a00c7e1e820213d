"""Sphinx configuration of the documentation; `python -m sphinx -W docs docs/_build` builds it."""

import sys
from importlib.metadata import version as _version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "cdt_lens"
author = "The cdt_lens developers"
project_copyright = author
release = version = _version("cdt_lens")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    # The extensions of docs/_ext.
    "docstrings",
    "generated",
    "mathml",
]
exclude_patterns = ["_build", "_ext"]

# Pages are Markdown; inline code that is a public name is written {any}`score_heads`.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
default_role = "py:obj"
smartquotes_action = "D"  # dashes only: quotation marks in help texts are literal

# Notebooks are shown as they were committed: CI runs them elsewhere.
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # the default loads scripts from another server

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints = "signature"
maximum_signature_line_length = 70
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False

# Nothing comes from another server, neither at build time nor in a reader's browser.
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"cdt_lens {release}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
