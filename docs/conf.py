"""Sphinx configuration: prose in Markdown, the API reference from docstrings."""

from trainkit._version import __version__

project = "trainkit"
author = "The trainkit authors"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}
# Docstrings write code in single backticks, as Markdown does.
default_role = "code"
html_theme = "furo"
html_title = f"trainkit {release}"

myst_enable_extensions = ["colon_fence", "deflist"]
# Prose links to headings of other pages; three levels are what the pages use.
myst_heading_anchors = 3

autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "show-inheritance": True,
}
autodoc_typehints = "signature"
# Short names keep signatures readable and links go to the page a reader imports from.
add_module_names = False
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# As a list of their own, attributes would be documented a second time beside the members.
napoleon_use_ivar = True
