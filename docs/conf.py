"""Sphinx configuration.

`make docs` builds with warnings as errors and without a network, so links into other projects' documentation,
for which intersphinx fetches their inventories, are made only where STRUCTMAT_DOCS_ONLINE=1 is set.
"""

import doctest
import os
import re
from importlib.metadata import version as installed_version

# For the examples and doctests: the threads of small products wait for each other, for minutes if the machine is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

project = "structmat"
author = "The structmat authors"
copyright = author
release = installed_version("structmat")
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "auto_examples/**/*.ipynb", "auto_examples/**/*.py", "auto_examples/**/*.md5"]
default_role = "code"  # docstrings write `name` in single backquotes, as Markdown does

# Text
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Reference
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True  # LINEAR_STD, not its digits
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False  # a class lists what it documents, not every override of the protocol
autodoc_default_options = {"members": True, "show-inheritance": True}
autoclass_content = "both"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# A dataclass documents its fields under "Attributes:"; as separate entries they would be there twice.
napoleon_use_ivar = True

# Doctests: every `>>>` of the pages and of the docstrings that they show.
doctest_default_flags = doctest.ELLIPSIS | doctest.DONT_ACCEPT_TRUE_FOR_1  # messages of exceptions are compared too
doctest_global_setup = """
import torch
import structmat

torch.manual_seed(0)
"""

# Examples: the scripts named plot_*.py are run, and one that fails, fails the build.
sphinx_gallery_conf = {
    "examples_dirs": "../examples/gallery",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"/plot_",
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
}

# Links into other projects' documentation
intersphinx_mapping = {}
if os.environ.get("STRUCTMAT_DOCS_ONLINE") == "1":
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "scipy": ("https://docs.scipy.org/doc/scipy", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }

html_theme = "furo"
html_title = f"structmat {release}"


def shapes_as_code(app, what, name, obj, options, lines):
    """Set shapes such as (*batch, m, n) in docstrings as code: for Sphinx the star opens an emphasis."""
    shape = re.compile(r"``[^`]*``|`[^`]*`|\(\*[\w,](?:[^()]|\([^()]*\))*\)")
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[i] = shape.sub(lambda found: found[0] if found[0][0] == "`" else f"``{found[0]}``", line)


def setup(app):
    """Connect the hook, before napoleon's (priority 500), which takes the docstring apart."""
    app.connect("autodoc-process-docstring", shapes_as_code, priority=400)
