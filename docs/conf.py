"""Sphinx: Markdown through MyST, the theme furo, docstrings through autodoc; ``-W`` makes warnings errors."""

from __future__ import annotations

import sys
from pathlib import Path

import tuckaway

sys.path.append(str(Path(__file__).parent / "extensions"))

project = "tuckaway"
author = "the tuckaway authors"
copyright = author
version = release = tuckaway.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "command_line",  # of this folder
]
exclude_patterns = ["_build", "extensions", "draw"]
source_suffix = {".md": "markdown"}

html_theme = "furo"
html_title = f"tuckaway {version}"
html_show_copyright = False
smartquotes = False  # an option's two dashes are two dashes

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_display_short_literal_types = True
