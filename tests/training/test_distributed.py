import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from tokenlearner_keras.training import distributed

pytestmark = pytest.mark.tensorflow
RUN = Path(__file__).parent / "distributed_run.py"


def run(folder, devices, *stage):
    path = folder / "results.json"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    result = subprocess.run(
        [sys.executable, str(RUN), str(devices), str(path), *stage],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(tmp_path_factory.mktemp("distributed"), 2)


@pytest.fixture(scope="module")
def state_results(tmp_path_factory):
    return run(tmp_path_factory.mktemp("states"), 2, "states")


def assert_equal(results, name, devices, tolerance=1e-5, scale=1, skip=()):
    one, many = results[f"{name}_1"], results[f"{name}_{devices}"]
    assert set(one) == set(many)
    for key in one:
        if key == "steps" or key in skip:
            continue
        np.testing.assert_allclose(
            many[key], one[key], rtol=scale * tolerance, atol=tolerance, err_msg=key
        )
    assert len(one["loss"]) == 3
    assert one["loss"][-1] < one["loss"][0]


def test_two_devices_equal_one(results):
    assert_equal(results, "everything", 2)


@pytest.mark.slow
def test_four_devices_equal_one(tmp_path):
    assert_equal(run(tmp_path, 4), "everything", 4)


def test_steps_per_execution(results):
    # 4 batches an epoch (the last one uneven), executed as 3 and 1.
    assert results["everything_1"]["steps"] == [0, 1, 2, 3] * 3
    assert results["everything_2"]["steps"] == [2, 5] * 3


def test_mixed_precision_and_gradient_accumulation(results):
    # One example more or less of 36: bfloat16 rounds scores to ties.
    assert_equal(results, "bfloat16", 2, tolerance=2e-3, skip=("accuracy",))


def test_loss_scaling(results):
    assert_equal(results, "float16", 2, tolerance=2e-3)


@pytest.mark.slow
def test_batch_normalization(state_results):
    assert_equal(state_results, "norm", 2)


@pytest.mark.slow
def test_replicas_stay_the_same_under_batch_normalization_and_dropout(state_results):
    result = state_results["dropout"]
    assert result["replicas_differ_by"] == 0
    # Counted once a training step, on every replica: 4 batches, 3 epochs.
    assert result["seed_steps"] == [12]
    assert result["loss"][-1] < result["loss"][0]


@pytest.mark.slow
def test_callbacks(state_results):
    assert_equal(state_results, "callbacks", 2)
    assert state_results["callbacks_2"]["rate"] < 0.1


def test_saved_model_is_plain(results):
    reloaded = results["reloaded"]
    assert reloaded["same_class"]
    assert reloaded["class"] == "Functional"
    assert reloaded["hooks"] == []
    np.testing.assert_allclose(
        reloaded["predictions"],
        results["everything_2"]["predictions"],
        rtol=1e-5,
        atol=1e-6,
    )


def small_model(cls=keras.Model):
    inputs = keras.Input((4,))
    return cls(inputs, keras.layers.Dense(2)(inputs))


def test_no_op_on_one_device():
    model = small_model()
    before = set(vars(model))
    assert distributed(model) is model
    assert set(vars(model)) == before


def test_misuse():
    import tensorflow as tf

    with pytest.raises(ValueError, match=r"`model` must be a `keras.Model`.*Received"):
        distributed("vit")
    model = small_model()
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        with pytest.raises(ValueError, match="must be made inside the scope"):
            distributed(model)

        class OwnStep(keras.Model):
            def train_step(self, data):
                return {}

        with pytest.raises(ValueError, match=r"OwnStep, which defines `train_step`"):
            distributed(small_model(OwnStep))
