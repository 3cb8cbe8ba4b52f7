"""Moments by tiles of tokens, against NumPy, and lengths not known before."""

import numpy as np
import pytest
from keras import ops

from tests.ops.vector_attention_reference import (
    BACKEND,
    reference,
    relative_errors,
    value_and_gradients,
)
from tokenlearner_keras.ops import _tiles, vector_attention


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 16, 64, 77, 200, 512, 513, 1000, 1024])
@pytest.mark.parametrize("channels", [3, 24])
def test_moments(channels, length, batch):
    rng = np.random.default_rng(length)
    # Multiples of 1/4096, to which 1024 can be added without rounding.
    x = rng.integers(-4096, 4097, (batch, length, channels)).astype("float32") / 4096
    factors = [rng.standard_normal(x.shape).astype("float32") for _ in range(2)]
    weights = [1.0 + 0.1 * p for p in range(23)]

    def make(x, *factors):
        # Padding, which lies far from the tokens, must not count.
        return x - 1024, factors

    tensors = [ops.convert_to_tensor(array) for array in (x + 1024, *factors)]
    sums = _tiles.moments(make, tensors, 23)
    results = _tiles.finish_moments(sums, weights)
    powers = x.astype("float64") ** np.arange(23)[:, None, None, None]
    for result, factor in zip(results, factors, strict=True):
        expected = (powers * factor).sum(2, keepdims=True)
        expected *= np.reshape(weights, (-1, 1, 1, 1))
        np.testing.assert_allclose(
            ops.convert_to_numpy(result), expected, rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize(
    ("channels", "expected"),
    [(1, 1), (3, 3), (36, 36), (64, 8), (100, 50), (127, 1), (432, 8), (768, 8)],
)
def test_columns_are_one_vector_where_possible(channels, expected):
    assert _tiles.columns(channels) == expected


@pytest.mark.parametrize("batch", [1, 2, 8, 1000, None])
@pytest.mark.parametrize("length", [1, 15, 64, 65, 512, 513, 4096])
def test_plan_covers_every_token(length, batch):
    rows, tiles, chunks = _tiles.plan(batch, length)
    assert rows % _tiles.GROUP == 0
    assert tiles <= _tiles.TILES
    count = tiles * chunks
    assert length <= rows * count < length + rows * chunks + count * _tiles.GROUP
    assert rows <= max(_tiles.GROUP, _tiles.ROWS // (batch or 4))


@pytest.mark.parametrize("length", [600, 1100])
def test_masks_over_several_chunks(length):
    rng = np.random.default_rng(length)
    shapes = [(2, 90, 2), (2, length, 2), (2, length, 2), (2, 90, 2)]
    arrays = [rng.standard_normal(s).astype("float32") for s in shapes]
    # Padding must not pass for keys near zero, masked keys not for any.
    arrays[1] += 50
    mask = np.broadcast_to(rng.random(length) < 0.7, (2, length))
    arrays[1][~mask] = 1e30
    results = value_and_gradients(*arrays, mask=mask)
    query, key, value, upstream = arrays
    kept = mask[0]
    expected = reference(query, key[:, kept], value[:, kept], upstream)
    results[2:] = [x[:, kept] for x in map(np.asarray, results[2:])]
    assert max(relative_errors(results, expected)) < 1e-5


@pytest.mark.tensorflow
@pytest.mark.parametrize("jit", [None, True])
def test_lengths_not_known_when_traced(jit):
    if BACKEND != "tensorflow":
        pytest.skip("shapes are known on the other backends")
    import tensorflow as tf

    rng = np.random.default_rng(1)
    shapes = [(2, 90, 2), (2, 70, 2), (2, 70, 2), (2, 90, 2)]
    arrays = [rng.standard_normal(s).astype("float32") for s in shapes]

    @tf.function(input_signature=[tf.TensorSpec((None, None, 2))] * 4, jit_compile=jit)
    def run(query, key, value, upstream):
        tensors = query, key, value
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            output = vector_attention(*tensors)
        return output, *tape.gradient(output, tensors, upstream)

    results = [x.numpy() for x in run(*arrays)]
    assert max(relative_errors(results, reference(*arrays))) < 1e-5
