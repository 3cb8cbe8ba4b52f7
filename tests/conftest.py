import os
from pathlib import Path

# Before the backend is imported: quiet logs, and the same numbers on every machine.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import keras
import numpy as np
import pytest

FIXTURES = Path(__file__).parent / "fixtures"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.name.startswith("test_contract"):
            item.add_marker(pytest.mark.backends)
    if keras.backend.backend() == "tensorflow":
        return
    skip = pytest.mark.skip(reason="needs the TensorFlow backend")
    for item in items:
        if "tensorflow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def clean_state():
    """The same seed, the default dtype policy and a fresh graph for every test."""
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")
    keras.utils.clear_session(free_memory=False)


@pytest.fixture
def load_fixture():
    """Returns a function from a fixture's name to its arrays, a plain dictionary."""

    def load(name):
        with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as arrays:
            return dict(arrays)

    return load
