"""Runs the tests of layers, ops and models on the other Keras backends.

On PyTorch all of them; on JAX, which compiles every operation anew for every shape,
those marked `backends`: the contract of every layer, and the values of the operations.
"""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="this is the inner run"
)
@pytest.mark.parametrize(
    ("backend", "marks"), [("jax", "backends and "), ("torch", "")]
)
def test_layers_on_other_backends(backend, marks):
    command = [
        sys.executable,
        *("-m", "pytest", "-q", "-x", "-m", f"{marks}not slow and not tensorflow"),
        *("-p", "no:cacheprovider", "-p", "no:xdist"),
        *("tests/layers", "tests/ops", "tests/models"),
    ]
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    print(result.stdout[-3000:])
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
