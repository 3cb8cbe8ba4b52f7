"""The form of the series for XLA on a GPU, on a CPU, against float64."""

import numpy as np
import pytest
from keras import ops

from tests.ops.test_vector_attention import HARD, normal
from tests.ops.vector_attention_reference import assert_accurate
from tokenlearner_keras.ops import _wide, vector_attention


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Makes every trace take this form; lists the calls of `weighted_moments`."""
    calls = []
    moments = _wide.weighted_moments
    monkeypatch.setattr(_wide, "is_best", lambda: True)
    monkeypatch.setattr(
        _wide, "weighted_moments", lambda *args: calls.append(args) or moments(*args)
    )
    return calls


@pytest.mark.backends
@pytest.mark.parametrize("scale", [0.01, 1.0, 1.8, 3.0, 10.0])
def test_accuracy(scale, wide):
    rng = np.random.default_rng(0)
    q, k = normal(rng, 70, scale, 9), normal(rng, 101, scale, 9)
    assert_accurate(q, k, normal(rng, 101, 1, 9))
    assert wide


@pytest.mark.parametrize("name", list(HARD))
def test_accuracy_on_hard_inputs(name):
    rng = np.random.default_rng(1)
    q, k, v = (normal(rng, 130) for _ in range(3))
    assert_accurate(*HARD[name](rng, np.float32(0.5) * q, k, v))


@pytest.mark.parametrize("method", ["auto", "interpolated"])
def test_masks(method):
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((3, n, 4)).astype("float32") for n in (60, 80, 80))
    mask = rng.random((3, 80)) < 0.7
    mask[1] = False
    k[~mask], v[~mask] = np.nan, np.inf
    output = ops.convert_to_numpy(vector_attention(q, k, v, mask=mask, method=method))
    assert np.all(output[1] == 0)
    k[~mask], v[~mask] = 0, 0
    assert_accurate(q, k, v, (method,), mask)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_infinities_give_the_nans_of_dense(which, value):
    rng = np.random.default_rng(3)
    tensors = {
        name: rng.standard_normal((1, 50, 3)).astype("float32")
        for name in ("query", "key", "value")
    }
    tensors[which][0, 4, 1] = value
    nans = [
        np.isnan(ops.convert_to_numpy(vector_attention(**tensors, method=method)))
        for method in ("auto", "dense")
    ]
    np.testing.assert_array_equal(*nans)


def test_interpolated_says_where_its_bound_fails():
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((1, 64, 3)).astype("float32") for _ in range(3))
    q[..., 0] *= 100
    output = ops.convert_to_numpy(vector_attention(q, k, v, method="interpolated"))
    assert np.all(np.isnan(output[..., 0]))
    assert np.all(np.isfinite(output[..., 1:]))


@pytest.mark.tensorflow
def test_second_derivatives():
    import tensorflow as tf

    rng = np.random.default_rng(5)
    tensors = [tf.constant(rng.standard_normal((1, 48, 2))) for _ in range(3)]

    def slope_of_slope(method):
        with tf.GradientTape() as outer:
            outer.watch(tensors)
            with tf.GradientTape() as inner:
                inner.watch(tensors)
                loss = tf.reduce_sum(vector_attention(*tensors, method=method) ** 2)
            slopes = inner.gradient(loss, tensors)
            total = sum(tf.reduce_sum(slope**2) for slope in slopes)
        return [x.numpy() for x in outer.gradient(total, tensors)]

    for ours, exact in zip(slope_of_slope("auto"), slope_of_slope("dense")):
        np.testing.assert_allclose(ours, exact, rtol=1e-6, atol=1e-8)
