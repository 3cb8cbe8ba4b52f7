"""The table of tensorflow-addons parts and what replaces them names real things."""

import importlib
import re
from pathlib import Path

import keras
import pytest

DOCS = Path(__file__).parents[2] / "docs"


def table_rows():
    text = (DOCS / "coming_from.md").read_text(encoding="utf-8")
    section = text.split("## TensorFlow Addons")[1].split("\n## ")[0]
    rows = re.findall(r"^\|(.+?)\|(.+?)\|$", section, re.MULTILINE)
    return [row for row in rows if "`tfa." in row[0]]


def names_in(cell, roots):
    """Dotted names of a cell; one without a root has the root of the name before it."""
    names, prefix = [], None
    for name in re.findall(r"`([A-Za-z_][\w.]*)`", cell):
        if name.split(".")[0] in roots:
            prefix = name.rpartition(".")[0]
        elif prefix is None:
            continue
        else:
            name = f"{prefix}.{name}"
        names.append(name)
    return names


def addons_names():
    return [name for row in table_rows() for name in names_in(row[0], ("tfa",))]


def exists(root, name):
    for part in name.split(".")[1:]:
        if not hasattr(root, part):
            return False
        root = getattr(root, part)
    return True


def test_replacements_exist():
    names = [
        name
        for row in table_rows()
        for name in names_in(row[1], ("keras", "tokenlearner_keras"))
    ]
    assert len(names) > 30
    for name in names:
        if name.startswith("keras."):
            assert exists(keras, name), name
        else:
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.slow
def test_parts_exist_in_tensorflow_addons(addons_python):
    import subprocess

    names = addons_names()
    assert len(names) > 40
    code = (
        "import functools, sys, tensorflow_addons as tfa; "
        "[functools.reduce(getattr, n.split('.')[1:], tfa) for n in sys.argv[1:]]"
    )
    subprocess.run([addons_python, "-c", code, *names], check=True)
