"""Environments of real clients, made once for all tests that need them.

Each needs a package index (pip or npm). `TOKENLEARNER_CLIENTS` names a folder in which
they are kept from one run of the tests to the next; without it they last one run.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ADDONS = ("tensorflow-cpu==2.15.1", "tensorflow-addons==0.23.0")
CONVERTER = ("tensorflowjs==4.22.0",)
# The converter's ydf wants a newer protobuf than its TensorFlow asks pip for; both run
# with this one.
CONVERTER_PROTOBUF = "protobuf==6.33.*"


def clients_folder(tmp_path_factory) -> Path:
    folder = os.environ.get("TOKENLEARNER_CLIENTS")
    if folder is None:
        base = tmp_path_factory.getbasetemp()
        # The workers of one run share the folder above their own.
        folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        folder = folder / "clients"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def once(folder: Path):
    """Yields whether `folder` is still to be filled; other processes wait meanwhile."""
    done = folder.with_name(f"{folder.name}.done")
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        is_missing = not done.exists()
        if is_missing:
            shutil.rmtree(folder, ignore_errors=True)
        yield is_missing
        done.touch()


def make_environment(folder: Path, *installs) -> Path:
    """Returns the Python of a virtual environment with the given pip installs."""
    python = folder / "bin" / "python"
    with once(folder) as is_missing:
        if is_missing:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            for arguments in installs:
                subprocess.run(
                    [python, "-m", "pip", "install", "-q", *arguments], check=True
                )
    return python


@pytest.fixture(scope="session")
def addons_python(tmp_path_factory):
    """Python with TensorFlow 2.15.1 (Keras 2) and tensorflow-addons 0.23."""
    if sys.version_info >= (3, 12):
        pytest.skip("TensorFlow 2.15 has wheels for Python 3.9 to 3.11 only")
    return make_environment(clients_folder(tmp_path_factory) / "addons", ADDONS)


@pytest.fixture(scope="session")
def converter_python(tmp_path_factory):
    """Python with the TensorFlow.js converter."""
    return make_environment(
        clients_folder(tmp_path_factory) / "converter",
        CONVERTER,
        ("--no-deps", CONVERTER_PROTOBUF),
    )


@pytest.fixture(scope="session")
def browser_example(tmp_path_factory):
    """The folder `examples/browser` with its npm packages, in a copy."""
    source = Path(__file__).parents[2] / "examples" / "browser"
    folder = clients_folder(tmp_path_factory) / "browser"
    with once(folder) as is_missing:
        if is_missing:
            shutil.copytree(
                source, folder, ignore=shutil.ignore_patterns("node_modules", "model")
            )
            subprocess.run(
                ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
                cwd=folder,
                check=True,
            )
    # The packages may be kept from an earlier run; the page is always today's.
    for file in source.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    return folder
