import json
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

from tests.contract import random_like
from tokenlearner_keras.evaluation import FEW_SHOT_DATASETS, few_shot
from tokenlearner_keras.evaluation.few_shot import (
    few_shot_predictions,
    load_few_shot_dataset,
    ridge,
)

CLASSES = 4


def blobs(seed, per_class=30, channels=6):
    """Classes around random centres; labels in a mixed order."""
    centres = random_like((CLASSES, channels), 7)
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(CLASSES), per_class))
    noise = rng.standard_normal((len(labels), channels))
    return (centres[labels] + 0.7 * noise).astype("float32"), labels


def small_model(channels=6):
    inputs = keras.Input((channels,))
    x = keras.layers.Dense(12, activation="tanh", name="features")(inputs)
    return keras.Model(inputs, keras.layers.Dense(CLASSES, name="head")(x))


def whitened(x, x_test):
    mean, deviation = x.mean(0), x.std(0) + 1e-5
    return [
        np.hstack([(z - mean) / deviation, np.full((len(z), 1), 100.0)])
        for z in (x, x_test)
    ]


@pytest.mark.parametrize("shape", [(40, 12), (12, 12), (8, 30)])
def test_ridge_equals_scikit_learn(shape):
    from sklearn.linear_model import Ridge

    x, y = random_like(shape, 1).astype("float64"), random_like((shape[0], 5), 2)
    strengths = [2.0**-6, 1.0, 2.0**10]
    weights = ridge(x, y, strengths)
    for strength, found in zip(strengths, weights):
        model = Ridge(alpha=strength, fit_intercept=False, solver="svd").fit(x, y)
        np.testing.assert_allclose(found, model.coef_.T, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shots", [1, 3, 20])
def test_predictions_equal_scikit_learn(shots):
    from sklearn.linear_model import Ridge

    (x, y), (x_test, _) = blobs(0), blobs(1)
    x, x_test = x.astype("float64"), x_test.astype("float64")
    chosen = np.concatenate([np.flatnonzero(y == c)[:shots] for c in range(CLASSES)])
    strengths = [2.0**-10, 1.0, 2.0**10]
    found = few_shot_predictions(x[chosen], y[chosen], x_test, CLASSES, strengths)
    train, test = whitened(x[chosen], x_test)
    targets = 2.0 * np.eye(CLASSES)[y[chosen]] - 1
    for strength, predictions in zip(strengths, found):
        model = Ridge(alpha=strength, fit_intercept=False, solver="svd")
        expected = model.fit(train, targets).predict(test)
        np.testing.assert_allclose(predictions, expected, rtol=1e-6, atol=1e-6)


def test_fixed_convention():
    model, (train, test) = small_model(), (blobs(0), blobs(1))
    report = few_shot(model, {"blobs": (train, test)}, shots=(1, 5), verbose=0)
    assert report.strengths == {1: 2.0**10, 5: 2.0**10}
    assert [(r["shots"], r["seed"]) for r in report.rows] == [
        (shots, seed) for seed in range(3) for shots in (1, 5)
    ]
    # One result by hand: another choice of images for each seed, from its labels.
    extract = keras.Model(model.inputs, model.get_layer("features").output)
    x, x_test = (extract.predict(z, verbose=0) for z in (train[0], test[0]))
    rng = np.random.default_rng(1)
    chosen = np.concatenate(
        [rng.permutation(np.flatnonzero(train[1] == c))[:5] for c in range(CLASSES)]
    )
    a, b = whitened(x[chosen].astype("float64"), x_test)
    targets = 2.0 * np.eye(CLASSES)[train[1][chosen]] - 1
    weights = np.linalg.solve(a.T @ a + 2.0**10 * np.eye(13), a.T @ targets)
    accuracy = np.mean((b @ weights).argmax(1) == test[1])
    assert report.accuracies("blobs", 5)[1] == pytest.approx(accuracy, abs=1e-12)
    assert accuracy > 0.6


def test_sweep_convention_takes_the_best_mean_rank():
    model = small_model()
    data = {name: (blobs(i), blobs(i + 10)) for i, name in enumerate("abc")}
    strengths = [2.0**-10, 2.0**4, 2.0**19]
    report = few_shot(
        model, data, shots=(2,), convention="sweep", strengths=strengths, verbose=0
    )
    assert {row["seed"] for row in report.rows} == {None}
    table = np.array(
        [
            [
                next(
                    r["accuracy"]
                    for r in report.rows
                    if r["dataset"] == name and r["strength"] == s
                )
                for s in strengths
            ]
            for name in "abc"
        ]
    )
    ranks = table.argsort(1, kind="stable").argsort(1).mean(0)
    assert report.strengths == {2: strengths[ranks.argmax()]}
    # The first images of each class, not shuffled.
    extract = keras.Model(model.inputs, model.get_layer("features").output)
    (x, y), (x_test, y_test) = data["a"]
    chosen = np.concatenate([np.flatnonzero(y == c)[:2] for c in range(CLASSES)])
    scores = few_shot_predictions(
        extract.predict(x[chosen], verbose=0),
        y[chosen],
        extract.predict(x_test, verbose=0),
        CLASSES,
        strengths,
    )
    accuracies = (scores.argmax(-1) == y_test).mean(1)
    np.testing.assert_allclose(table[0], accuracies, atol=0.02)
    default = few_shot(model, data, shots=(2,), convention="sweep", verbose=0)
    assert len(default.rows) == 3 * 30


def test_report(tmp_path):
    data = {name: (blobs(i), blobs(i + 10)) for i, name in enumerate("ab")}
    report = few_shot(small_model(), data, shots=(1, 10), verbose=0)
    path = tmp_path / "report.json"
    report.to_json(path)
    stored = json.loads(path.read_text())
    assert stored["rows"] == report.rows
    mean = np.mean([report.accuracies(n, 10) for n in "ab"])
    assert stored["summary"]["average"]["10"]["mean"] == pytest.approx(mean)
    lines = str(report).splitlines()
    assert lines[0].split() == ["1-shot", "10-shot"]
    assert [line.split()[0] for line in lines[1:]] == ["a", "b", "average"]
    assert f"{100 * mean:.2f} ±" in lines[-1]


def test_features_are_cached(tmp_path, capsys):
    model, data = small_model(), {"blobs": (blobs(0), blobs(1))}
    first = few_shot(model, data, cache_dir=tmp_path)
    assert "blobs, train:" in capsys.readouterr().out  # with its progress bar
    assert len(list(tmp_path.glob("*.npz"))) == 2
    again = few_shot(model, data, cache_dir=tmp_path)
    assert capsys.readouterr().out == ""
    assert again.rows == first.rows
    # Other weights and other data are other features.
    model.layers[1].kernel.assign(-2 * model.layers[1].kernel)
    few_shot(model, data, cache_dir=tmp_path, verbose=0)
    assert len(list(tmp_path.glob("*.npz"))) == 4
    few_shot(model, {"blobs": (blobs(0), blobs(2))}, cache_dir=tmp_path, verbose=0)
    assert len(list(tmp_path.glob("*.npz"))) == 5


@pytest.mark.tensorflow
def test_tf_data_and_layers():
    import tensorflow as tf

    model, (train, test) = small_model(), (blobs(0), blobs(1))
    expected = few_shot(model, {"blobs": (train, test)}, verbose=0)
    batched = [tf.data.Dataset.from_tensor_slices(z).batch(32) for z in (train, test)]
    found = few_shot(model, {"blobs": batched}, layer="features", verbose=0)
    assert found.rows == expected.rows


def test_tokens_are_averaged():
    inputs = keras.Input((6,))
    x = keras.layers.Reshape((3, 2))(inputs)
    model = keras.Model(inputs, keras.layers.Dense(5, activation="tanh")(x))
    flat = keras.layers.GlobalAveragePooling1D()(model.layers[-1].output)
    pooled = keras.Model(model.inputs, flat)
    data = {"blobs": (blobs(0), blobs(1))}
    layer = model.layers[-1].name
    found = few_shot(model, data, layer=layer, verbose=0)
    assert found.rows == few_shot(pooled, data, verbose=0).rows


@pytest.mark.tensorflow
def test_on_two_devices():
    # Virtual devices are set before TensorFlow starts, so in another process.
    code = """
import tensorflow as tf
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
import keras
from tests.evaluation.test_few_shot import blobs, small_model
from tokenlearner_keras.evaluation import few_shot
from tokenlearner_keras.training import get_strategy
model, data = small_model(), {"blobs": (blobs(0), blobs(1))}
tfdata = {"blobs": [tf.data.Dataset.from_tensor_slices(z).batch(32) for z in data["blobs"]]}
one = few_shot(model, data, verbose=0)
strategy = get_strategy("mirrored", devices=["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
two = few_shot(model, data, strategy=strategy, verbose=0)
streamed = few_shot(model, tfdata, strategy=strategy, verbose=0)
for a, b, c in zip(one.rows, two.rows, streamed.rows):
    assert abs(a["accuracy"] - b["accuracy"]) < 0.01, (a, b)
    assert abs(a["accuracy"] - c["accuracy"]) < 0.01, (a, c)
print("equal")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.stdout.endswith("equal\n"), result.stderr[-3000:]


def test_the_nine_data_sets():
    assert len(FEW_SHOT_DATASETS) == 9
    tfds = pytest.importorskip("tensorflow_datasets")
    known = set(tfds.list_builders(with_community_datasets=False))
    assert {name for name, *_ in FEW_SHOT_DATASETS.values()} <= known


@pytest.mark.tensorflow
def test_reading_one_of_them(monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=5):
        train, test = load_few_shot_dataset("cifar100", batch_size=2)
        images, labels = next(iter(train))
        assert images.shape == (2, 224, 224, 3)
        assert -1 <= float(np.min(images)) < 0 < float(np.max(images)) <= 1
        assert labels.shape == (2,)
        assert len(list(test)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(convention="both"), "Invalid value for argument `convention`"),
        (dict(shots=()), "Argument `shots` must be integers of at least 1"),
        (dict(shots=(0,)), "Argument `shots` must be integers of at least 1"),
        (dict(shots=(31,)), "number of training images of each class"),
        (dict(seeds=(-1,)), "Argument `seeds` must be integers of at least 0"),
        (dict(strengths=(1.0, 2.0)), "must be one number for the convention 'fixed'"),
        (dict(strengths=(-1.0,)), "Argument `strengths` must be positive"),
        (dict(datasets=["svhn"]), "must hold names of few-shot data sets"),
        (dict(layer="none"), "No such layer: none"),
    ],
)
def test_misuse(arguments, message):
    arguments = {"datasets": {"blobs": (blobs(0), blobs(1))}, **arguments}
    with pytest.raises(ValueError, match=re.escape(message)):
        few_shot(small_model(), verbose=0, **arguments)


def test_bad_data():
    (x, y), test = blobs(0), blobs(1)
    with pytest.raises(ValueError, match="must be equally many"):
        few_shot(small_model(), {"blobs": ((x, y[:-1]), test)}, verbose=0)
    broken = x.copy()
    broken[3] = np.nan
    with pytest.raises(ValueError, match="must be finite"):
        few_shot(small_model(), {"blobs": ((broken, y), test)}, verbose=0)
