import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.contract import randomize_weights
from tokenlearner_keras.export import export_saved_model
from tokenlearner_keras.models import ViTConfig, vit

CLIENT = Path(__file__).parent / "clients" / "addons_client.py"


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.tensorflow
def test_tensorflow_addons_rotates_predicts_and_fine_tunes(addons_python, tmp_path):
    model = vit(ViTConfig(4, 32, 2, 2, 64), (16, 16, 3), 5, num_tokens=4, name="small")
    randomize_weights(model, scale=0.2)
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (16, 16, 16, 3)).astype("float32")
    labels = rng.integers(0, 5, 16)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    export_saved_model(model, tmp_path / "saved_model", signatures=("serve", "train"))

    subprocess.run([addons_python, CLIENT], cwd=tmp_path, check=True)

    with np.load(tmp_path / "results.npz") as arrays:
        results = dict(arrays)
    # Images that tensorflow-addons rotated, through the SavedModel.
    assert np.abs(results["rotated"] - images).max() > 0.5
    assert_close(
        results["rotated_probabilities"],
        softmax(model.predict(results["rotated"], verbose=0)),
    )
    # Three steps of LAMB: the loss falls at each.
    losses = results["losses"]
    assert len(losses) == 4
    assert np.all(np.diff(losses) < 0), losses
    # The serving signature uses the tuned weights, as Keras does with the same ones.
    before = [np.array(variable) for variable in model.trainable_variables]
    for index, variable in enumerate(model.trainable_variables):
        variable.assign(results[f"variable_{index}"])
    moved = [
        np.any(np.array(v) != b) for v, b in zip(model.trainable_variables, before)
    ]
    assert all(moved)
    expected = softmax(model.predict(images, verbose=0))
    assert_close(results["probabilities"], expected)
    assert_close(results["saved_again"], expected)
