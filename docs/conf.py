"""Sphinx configuration: `sphinx-build -W docs site` writes the documentation."""

import inspect
import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.inspect import stringify_signature

import tokenlearner_keras

project = "tokenlearner_keras"
author = "the tokenlearner_keras authors"
version = release = tokenlearner_keras.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
html_theme = "furo"
html_title = "tokenlearner_keras"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_math_renderer = "mathml"
highlight_language = "none"
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"exclude-members": "build, call, compute_mask, get_config"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [
    ("Call arguments", "params_style"),
    ("Output", "returns_style"),
]


def convert_markdown(app, what, name, obj, options, lines):
    """Docstrings have Markdown's code and links, as Keras's do."""
    fences = re.split(r"^ *```.*$", "\n".join(lines), flags=re.MULTILINE)
    for i, part in enumerate(fences):
        if i % 2:
            part = part.replace("\n", "\n    ")
            indent = re.search(r"\n( *)    \S", part)[1]
            fences[i] = f"{indent}.. code-block:: python\n{part}"
        else:
            part = re.sub(r"`([^`]+)`", mark_code, part)
            # Napoleon takes what stands before a colon for the type of the result.
            part = re.sub(r"((?:Returns|Output):\n)( *)", r"\1\2\\ \n\2", part)
            fences[i] = re.sub(r"\[([^\]]+)\]\s*\((http[^)]+)\)", r"`\1 <\2>`__", part)
    lines[:] = "".join(fences).split("\n")


def mark_code(match):
    """A literal, but for a lone name, which may become a link to its entry."""
    return match[0] if re.fullmatch(r"\w[\w.]*", match[1]) else f"``{match[1]}``"


def show_constructor(app, what, name, obj, options, signature, returned):
    """Keras's classes have a `__new__` that hides the arguments of `__init__`."""
    if what == "class" and signature == "(*args, **kwargs)":
        arguments = inspect.signature(obj.__init__)
        own = list(arguments.parameters.values())[1:]
        shown = stringify_signature(
            arguments.replace(parameters=own), show_annotation=False
        )
        return shown, returned


def write_mathml(self, node):
    """Formulas as MathML: a page needs neither a script nor the network."""
    if isinstance(node, nodes.math_block):
        formula = tex2mathml(node.astext(), as_block=True)
        self.body.append(f'<div class="formula">{formula}</div>')
    else:
        self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def setup(app):
    """Connects the conversion, before napoleon's (500)."""
    app.connect("autodoc-process-docstring", convert_markdown, priority=400)
    app.connect("autodoc-process-signature", show_constructor)
    app.add_html_math_renderer("mathml", (write_mathml, None), (write_mathml, None))
