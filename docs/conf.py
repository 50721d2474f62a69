"""The documentation site: `make docs` builds it, in build/docs."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import docstrings
from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

import mfac_kernels

logger = logging.getLogger(__name__)

project = "mfac_kernels"
version = release = mfac_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

highlight_language = "text"  # formulas, commands; what is Python says so

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"mfac_kernels {release}"
html_copy_source = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]


def link_files(content):
    """Records of benchmarks are pages, in the folder that results leads to; other files outside are to download."""
    content[0] = re.sub(r"\[([^]]*)\]\(\.\./benchmarks/(results/[^)#]*)\.md\)", r"{doc}`\1 </\2>`", content[0])
    content[0] = re.sub(r"\]\((\.\./[^)#]*\.md)\)", r"](path:\1)", content[0])


def read_source(app, name, content):
    """Records are in no table of contents, and those that begin with their settings have no title."""
    link_files(content)
    if name.startswith("results/"):
        title = "" if content[0].startswith("# ") else f"# {name.removeprefix('results/').removesuffix('/results')}\n\n"
        content[0] = f"---\norphan: true\n---\n\n{title}{content[0]}"


def from_the_root(content):
    """README, which the first page includes: its links lead from the folder above."""
    content[0] = re.sub(r"\]\((?!\w+:)", "](../", content[0]).replace("](../docs/", "](")
    link_files(content)


def mathml(node, as_block=False):
    """What browsers read as it is: no script, and no network to fetch one from."""
    try:
        return tex2mathml(node.astext(), as_block=as_block)
    except MathError as error:
        logger.warning("%s", error, location=node)
        return ""


def inline_math(writer, node):
    writer.body.append(mathml(node))
    raise SkipNode


def displayed_math(writer, node):
    writer.body.append(f'<div class="math">{mathml(node, as_block=True)}</div>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline_math, None), (displayed_math, None))
    # Before napoleon, which makes fields of "Args:" and its like.
    app.connect("autodoc-process-docstring", docstrings.process, priority=400)
    app.connect("source-read", read_source)
    app.connect("include-read", lambda app, path, parent, content: from_the_root(content))
