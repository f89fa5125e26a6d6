"""Sphinx: Markdown through MyST, furo's theme, docstrings through autodoc. Warnings are errors (``sphinx-build -W``)."""

from __future__ import annotations

from importlib.metadata import version as version_of

project = "tuckaway"
author = "the tuckaway authors"
copyright = author
version = release = version_of("tuckaway")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

html_theme = "furo"
html_title = f"tuckaway {version}"
html_show_copyright = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_display_short_literal_types = True
