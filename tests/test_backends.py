"""Runs the tests of layers, ops and models on the other Keras backends."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="this is the inner run"
)
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_layers_on_other_backends(backend):
    command = [
        sys.executable,
        *("-m", "pytest", "-q", "-x", "-m", "not slow and not tensorflow"),
        *("-p", "no:cacheprovider", "-p", "no:xdist"),
        *("tests/layers", "tests/ops", "tests/models"),
    ]
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
