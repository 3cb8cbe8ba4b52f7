"""The power series, against NumPy."""

import numpy as np
import pytest
from keras import ops

from tokenlearner_keras.ops import _series, _tiles, _wide


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
