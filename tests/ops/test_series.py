"""The power series, against NumPy."""

import numpy as np
import pytest
from keras import ops

from tests.ops.vector_attention_reference import reference, relative_errors
from tokenlearner_keras.ops import _series, _tiles, _wide, vector_attention
from tokenlearner_keras.ops.vector_attention import _auto_pair


@pytest.mark.parametrize("terms", [1, 2, 9, 48, 49, 64, 77])
def test_evaluate_is_a_polynomial(terms):
    rng = np.random.default_rng(0)
    series = rng.standard_normal((2, terms, 2, 1, 3)).astype("float32")
    x = rng.uniform(-1, 1, (2, 5, 3)).astype("float32")
    tensors = [ops.convert_to_tensor(c) for c in series]
    results = _series.evaluate(tensors, ops.convert_to_tensor(x))
    halves = _series.halves(tensors, ops.convert_to_tensor(x))
    powers = x ** np.arange(terms)[:, None, None, None]
    for result, half, coefficients in zip(results, halves, series, strict=True):
        parts = coefficients * powers
        expected = parts.sum(0), parts[0::2].sum(0), parts[1::2].sum(0)
        for got, wanted in zip((result, *half), expected, strict=True):
            np.testing.assert_allclose(ops.convert_to_numpy(got), wanted, atol=1e-5)


@pytest.mark.parametrize("form", [_tiles, _wide])
@pytest.mark.parametrize("masked", [False, True])
def test_coefficients_of_the_keys(form, masked):
    rng = np.random.default_rng(1)
    key, value = (rng.standard_normal((2, 50, 3)).astype("float32") for _ in range(2))
    mask = (rng.random((2, 50, 1)) < (0.6 if masked else 1)).astype("float32")
    key, value = key * mask, value * mask
    tensors = [form.enter(ops.convert_to_tensor(x), 3) for x in (key, value, mask)]
    if not masked:
        tensors[2] = None
    size = _series.size(12)
    frame = _series.frame(*tensors)
    sums = _series.key_sums(form.weighted_moments, *tensors, frame, size)
    low, high = (
        f(np.where(mask > 0, key, sign * np.inf), axis=1, keepdims=True)
        for f, sign in ((np.min, 1), (np.max, -1))
    )
    t = ((key - (low + high) / 2) / ((high - low) / 2) * mask).astype("float64")
    mean = value.sum(1, keepdims=True) / mask.sum(1, keepdims=True)
    y = (value - mean) * mask
    for result, factor, shift in zip(sums, (mask, y, mask, y), (0, 0, 1, 1)):
        expected = [
            scale * (t ** (p + shift) * factor).sum(1)
            for p, scale in enumerate(size[2])
        ]
        result = ops.convert_to_numpy(result).reshape(12, 2, 3)
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


# The series of 35, 40 and 64 terms reach as far as 21, 26 and 45.
@pytest.mark.parametrize(
    ("keys", "z", "terms"),
    [
        *((60, 20.9, 35), (60, 21.1, 64), (60, 44.9, 64), (60, 45.1, None)),
        *((1025, 20.9, 35), (1025, 21.1, 40), (1025, 25.9, 40), (1025, 26.1, 64)),
        *((1025, 44.9, 64), (1025, 45.1, None)),
    ],
)
def test_auto_takes_the_shortest_series_that_reaches(keys, z, terms):
    rng = np.random.default_rng(2)
    # Evenly spread keys cancel little.
    key = np.tile(np.linspace(-1, 1, keys)[:, None], (1, 1, 3))
    query = rng.uniform(-z, z, (1, 60, 3))
    query[0, 7, 1] = z
    value = rng.standard_normal(key.shape)
    arrays = [x.astype("float32") for x in (query, key, value, np.ones((1, keys, 1)))]
    tensors = [ops.convert_to_tensor(x) for x in arrays]
    forward, _ = _auto_pair("float32", has_mask=False)
    output, (_, index, *_) = forward(*tensors)
    taken = [n for n, _, _ in _series.sizes("float32", keys > 1024)] + [None]
    assert taken[int(index)] == terms
    expected = reference(*arrays[:3], query)[:1]
    assert relative_errors([ops.convert_to_numpy(output)], expected)[0] <= 1e-5


@pytest.mark.parametrize(
    ("queries", "keys", "terms"),
    [(60, 1024, [35, 64]), (60, 1025, [35, 40, 64]), (1025, 60, [35, 40, 64])],
)
def test_many_tokens_have_more_series(queries, keys, terms, monkeypatch):
    real, seen = _series.sizes, []

    def sizes(*args):
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(_series, "sizes", sizes)
    query, key = (np.zeros((1, n, 2), "float32") for n in (queries, keys))
    vector_attention(query, key, key)
    assert [[n for n, _, _ in x] for x in seen] == [terms]
