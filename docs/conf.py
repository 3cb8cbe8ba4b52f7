"""Sphinx configuration: `sphinx-build -W docs site` writes the documentation."""

import tokenlearner_keras

project = "tokenlearner_keras"
author = "the tokenlearner_keras authors"
version = release = tokenlearner_keras.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
html_theme = "furo"
html_title = "tokenlearner_keras"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"exclude-members": "build, call, compute_mask, get_config"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [
    ("Call arguments", "params_style"),
    ("Output", "returns_style"),
]


def convert_code_blocks(app, what, name, obj, options, lines):
    """Docstrings have Markdown's fences around code, as Keras's do."""
    converted, inside = [], False
    for line in lines:
        if line.strip().startswith("```"):
            inside = not inside
            indent = line[: len(line) - len(line.lstrip())]
            if inside:
                converted += [f"{indent}.. code-block:: python", ""]
        else:
            converted.append(f"    {line}" if inside else line)
    lines[:] = converted


def setup(app):
    """Connects the conversion, before napoleon's (500)."""
    app.connect("autodoc-process-docstring", convert_code_blocks, priority=400)
