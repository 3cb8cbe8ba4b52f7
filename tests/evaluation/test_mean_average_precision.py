import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from tokenlearner_keras.evaluation import MeanAveragePrecision

CLASSES = 7


def make_data(num_examples=300, seed=0, ties=False, num_empty=2):
    rng = np.random.default_rng(seed)
    labels = (rng.random((num_examples, CLASSES)) < 0.15).astype("float32")
    if num_empty:
        labels[:, -num_empty:] = 0
    scores = rng.standard_normal((num_examples, CLASSES)) + labels
    if ties:
        scores = np.round(scores, 1)
    return labels, scores.astype("float32")


def sklearn_values(labels, scores, sample_weight=None):
    values = np.full(labels.shape[1], np.nan)
    for index in np.flatnonzero(labels.sum(axis=0)):
        values[index] = average_precision_score(
            labels[:, index], scores[:, index], sample_weight=sample_weight
        )
    return values


def feed(metric, labels, scores, batch=32, sample_weight=None):
    for start in range(0, len(labels), batch):
        part = slice(start, start + batch)
        weight = None if sample_weight is None else sample_weight[part]
        metric.update_state(labels[part], scores[part], weight)
    return metric


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equals_sklearn(seed, ties):
    labels, scores = make_data(seed=seed, ties=ties)
    metric = feed(MeanAveragePrecision(CLASSES, capacity=300), labels, scores)
    expected = sklearn_values(labels, scores)
    np.testing.assert_allclose(metric.per_class(), expected, rtol=0, atol=1e-6)
    assert float(metric.result()) == pytest.approx(np.nanmean(expected), abs=1e-6)


def test_equals_sklearn_at_the_size_of_charades():
    # 1,863 test videos, 157 classes.
    rng = np.random.default_rng(0)
    labels = (rng.random((1863, 157)) < 0.04).astype("float32")
    scores = (rng.standard_normal(labels.shape) + labels).astype("float32")
    metric = feed(MeanAveragePrecision(157, capacity=1863), labels, scores, batch=256)
    expected = sklearn_values(labels, scores)
    np.testing.assert_allclose(metric.per_class(), expected, rtol=0, atol=1e-6)
    assert float(metric.result()) == pytest.approx(np.mean(expected), abs=1e-6)


def test_known_value():
    # Ranks of the positives: 1 and 3, so (1/1 + 2/3) / 2.
    metric = MeanAveragePrecision(1, capacity=4)
    metric.update_state([[1], [0], [1], [0]], [[0.9], [0.8], [0.7], [0.1]])
    assert float(metric.result()) == pytest.approx(5 / 6, abs=1e-7)


def test_all_scores_equal_give_the_share_of_positives():
    metric = MeanAveragePrecision(1, capacity=8)
    metric.update_state([[1]] + 7 * [[0]], 8 * [[0.5]])
    assert float(metric.result()) == pytest.approx(1 / 8, abs=1e-7)


def test_order_of_the_examples_does_not_matter():
    labels, scores = make_data(ties=True)
    order = np.random.default_rng(1).permutation(len(labels))
    first = feed(MeanAveragePrecision(CLASSES, capacity=300), labels, scores)
    second = feed(
        MeanAveragePrecision(CLASSES, capacity=300), labels[order], scores[order], 7
    )
    assert float(first.result()) == pytest.approx(float(second.result()), abs=1e-6)


def test_weights_and_padding():
    labels, scores = make_data()
    weights = np.random.default_rng(2).integers(0, 3, len(labels)).astype("float32")
    metric = MeanAveragePrecision(CLASSES, capacity=300)
    feed(metric, labels, scores, sample_weight=weights)
    expected = sklearn_values(labels, scores, weights)
    np.testing.assert_allclose(metric.per_class(), expected, rtol=0, atol=1e-6)
    # A weight of zero leaves the example out altogether.
    kept = feed(
        MeanAveragePrecision(CLASSES, capacity=300),
        *(a[weights > 0] for a in (labels, scores)),
    )
    metric.reset_state()
    feed(metric, labels, scores, sample_weight=(weights > 0).astype("float32"))
    assert float(metric.result()) == pytest.approx(float(kept.result()), abs=1e-6)


def test_policies_for_classes_without_positives():
    labels, scores = make_data(num_empty=2)
    values = sklearn_values(labels, scores)
    expected = {
        "ignore": np.nanmean(values),
        "zero": np.nansum(values) / CLASSES,
        "nan": np.nan,
    }
    for policy, value in expected.items():
        metric = MeanAveragePrecision(CLASSES, 300, without_positives=policy)
        result = float(feed(metric, labels, scores).result())
        np.testing.assert_allclose(result, value, rtol=0, atol=1e-6)
        assert np.isnan(metric.per_class()).tolist() == 5 * [False] + 2 * [True]


def test_without_any_example_the_value_is_nan():
    assert np.isnan(float(MeanAveragePrecision(CLASSES, 10).result()))


def test_a_score_that_is_nan_shows():
    labels, scores = make_data(num_empty=0)
    scores[3, 1] = np.nan
    metric = feed(MeanAveragePrecision(CLASSES, 300), labels, scores)
    assert np.isnan(float(metric.result()))
    assert np.isnan(np.asarray(metric.per_class())).tolist() == [False, True] + 5 * [
        False
    ]


def test_reset_starts_anew():
    labels, scores = make_data()
    metric = MeanAveragePrecision(CLASSES, capacity=300)
    feed(metric, 1 - labels, scores)
    metric.reset_state()
    feed(metric, labels, scores)
    expected = np.nanmean(sklearn_values(labels, scores))
    assert float(metric.result()) == pytest.approx(expected, abs=1e-6)


def test_too_many_examples():
    labels, scores = make_data(num_examples=33)
    metric = feed(MeanAveragePrecision(CLASSES, capacity=32), labels, scores, 10)
    with pytest.raises(
        ValueError, match=r"a larger `capacity`. Received: 33 examples with capacity=32"
    ):
        metric.result()
    metric.reset_state()
    feed(metric, labels[:32], scores[:32])
    assert 0 < float(metric.result()) <= 1


@pytest.mark.parametrize("capacity", [64, 30])
def test_inside_fit_and_evaluate(capacity):
    labels, scores = make_data(num_examples=64, num_empty=0)
    model = keras.Sequential([keras.Input((CLASSES,)), keras.layers.Identity()])
    model.compile(loss="mse", metrics=[MeanAveragePrecision(CLASSES, capacity)])
    if capacity < 64:
        with pytest.raises(
            ValueError, match=r"Received: \d+ examples with capacity=30"
        ):
            model.evaluate(scores, labels, verbose=0)
        return
    value = model.evaluate(scores, labels, batch_size=10, verbose=0)[1]
    assert value == pytest.approx(np.mean(sklearn_values(labels, scores)), abs=1e-6)


@pytest.mark.tensorflow
def test_overflow_in_a_compiled_step_is_nan():
    import tensorflow as tf

    labels, scores = make_data(num_examples=33, num_empty=0)
    metric = MeanAveragePrecision(CLASSES, capacity=32)

    @tf.function(jit_compile=True)
    def step(labels, scores):
        metric.update_state(labels, scores)
        return metric.result()

    assert 0 < float(step(labels[:32], scores[:32])) <= 1
    assert np.isnan(float(step(labels[32:], scores[32:])))


def test_config_round_trip():
    metric = MeanAveragePrecision(5, 20, "zero", name="mAP")
    config = metric.get_config()
    assert MeanAveragePrecision.from_config(config).get_config() == config
    twin = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(metric)
    )
    assert twin.get_config() == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "`num_classes` must be an integer of at least 1"),
        ({"capacity": 0}, "`capacity` must be an integer of at least 1"),
        ({"without_positives": "drop"}, "Received: without_positives='drop'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MeanAveragePrecision(**{"num_classes": 3, **arguments})


def test_bad_shapes():
    metric = MeanAveragePrecision(3)
    with pytest.raises(ValueError, match=r"`y_pred` .* \(batch, 3\). Received: shape"):
        metric.update_state(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="`y_true`"):
        metric.update_state(np.zeros(2), np.zeros((2, 3)))


MIRRORED = """
import json, sys
import numpy as np
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)
import keras
from tokenlearner_keras.evaluation import MeanAveragePrecision
from tokenlearner_keras.training import get_strategy

labels, scores = (np.load(path) for path in sys.argv[1:])
strategy = get_strategy("mirrored", devices=["CPU:0", "CPU:1"])
values = {}
with strategy.scope():
    metric = MeanAveragePrecision(labels.shape[1], capacity=len(labels))
    model = keras.Sequential([keras.Input(labels.shape[1:]), keras.layers.Identity()])
    model.compile(loss="mse", metrics=[metric])
assert metric.num_examples.value.values, "the state is not distributed"
for batch in (50, 300):
    # 301 examples: the last batch is odd, and one replica has less of it, or none.
    values[batch] = model.evaluate(scores, labels, batch_size=batch, verbose=0)[1]
    counts = [int(v) for v in strategy.experimental_local_results(metric.num_examples.value)]
    assert sum(counts) == len(labels) and min(counts) > 0, counts
values["per_class"] = np.asarray(metric.per_class()).tolist()
with strategy.scope():
    small = MeanAveragePrecision(labels.shape[1], capacity=8)
    model = keras.Sequential([keras.Input(labels.shape[1:]), keras.layers.Identity()])
    model.compile(loss="mse", metrics=[small])
    small._rows = 40  # the margin is wider than this test's data
try:
    model.evaluate(scores, labels, batch_size=16, verbose=0)
except ValueError as error:
    values["error"] = str(error)
print("RESULT" + json.dumps(values))
"""


@pytest.mark.tensorflow
def test_mirrored_strategy_on_two_devices(tmp_path):
    labels, scores = make_data(num_examples=301, ties=True)
    paths = [str(tmp_path / "labels.npy"), str(tmp_path / "scores.npy")]
    np.save(paths[0], labels)
    np.save(paths[1], scores)
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    result = subprocess.run(
        [sys.executable, "-c", MIRRORED, *paths],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    values = json.loads(result.stdout.split("RESULT")[1])
    expected = sklearn_values(labels, scores)
    np.testing.assert_allclose(values.pop("per_class"), expected, rtol=0, atol=1e-6)
    assert "Received: 301 examples with capacity=8" in values.pop("error")
    for batch, value in values.items():
        assert value == pytest.approx(np.nanmean(expected), abs=1e-6), batch
