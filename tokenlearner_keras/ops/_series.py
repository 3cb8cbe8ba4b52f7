"""Vector attention in linear time: power series and moments.

For one channel, with keys centred on the middle of their range, `t_j = (k_j - c) / r`
in [-1, 1] and `s_i = q_i r / Z`,

    sum_j e^(q_i k_j) v_j  ~  sum_p a_p s_i^p M_p,    M_p = sum_j t_j^p v_j,

where `a_p = c_p Z^p / p!` are the coefficients of a polynomial close to `e^(Z s)`.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from tokenlearner_keras.ops._backend import loop
from tokenlearner_keras.ops._coefficients import BFLOAT16_COEFFICIENTS, COEFFICIENTS
from tokenlearner_keras.ops._streaming import key_limits

# Where alternating terms cancel by more than this (root mean square over the queries
# of one channel), float32 would lose more than a relative 1e-5.
MAX_CANCELLATION = 16.0

# Of the compiled series, those of `"auto"`. With queries and keys of unit scale, one of
# 3456 channels needs more than the shortest in 3 of 100 cases of 1024 tokens, and in 50
# of 4096.
AUTO_TERMS = (35, 64)
MANY_TOKENS = 1024
AUTO_TERMS_OF_MANY = (35, 40, 64)

# Longer series are summed by a loop, several side by side and so many terms at a time:
# tracing and compiling take long over long expressions.
UNROLLED = 48
STRIDE = 16


@functools.cache
def sizes(dtype="float32", many=False):
    """Returns what `"auto"` compiles: terms, reach, coefficients.

    Args:
        dtype: Dtype of the computation.
        many: Whether there are more than `MANY_TOKENS` queries or keys.
    """
    if dtype == "float64":
        reaches = [(n, taylor_reach(n, 2.0**-52)) for n in (48, 96)]
        table = [(n, z, (1.0,) * n) for n, z in reaches]
    else:
        numbers = AUTO_TERMS_OF_MANY if many else AUTO_TERMS
        table = [x for x in COEFFICIENTS if x[0] in numbers]
    return tuple((n, z, _scaled(c, z)) for n, z, c in table)


def taylor_reach(num_terms, tolerance):
    """Returns the largest z whose Taylor series has the given relative remainder."""
    low, high = 0.0, float(num_terms)
    for _ in range(60):
        middle = (low + high) / 2
        if taylor_remainder(num_terms, middle) <= tolerance:
            low = middle
        else:
            high = middle
    return low


def taylor_remainder(num_terms, z):
    """Returns sum_{p >= num_terms} z^p / p! e^-z, from above."""
    if z <= 0:
        return 0.0
    if z >= num_terms:
        return 1.0
    first = math.exp(num_terms * math.log(z) - math.lgamma(num_terms + 1) - z)
    return min(1.0, first / (1 - z / (num_terms + 1)))


def _scaled(coefficients, reach):
    return tuple(
        # e^-reach, which cancels in the ratio, keeps the terms near one.
        c * math.exp(p * math.log(reach) - math.lgamma(p + 1) - reach)
        for p, c in enumerate(coefficients)
    )


def _table(dtype):
    """Returns the fitted polynomials that are exact enough for a dtype."""
    if dtype == "float64":
        return ()
    return COEFFICIENTS + (BFLOAT16_COEFFICIENTS if dtype == "bfloat16" else ())


def size(num_terms, dtype="float32"):
    """Returns the size with `num_terms` terms."""
    for terms, reach, coefficients in _table(dtype):
        if terms == num_terms:
            return num_terms, reach, _scaled(coefficients, reach)
    reach = taylor_reach(num_terms, 2.0**-52 if dtype == "float64" else 2.0**-23)
    return num_terms, reach, _scaled((1.0,) * num_terms, reach)


def remainder(num_terms, z, dtype="float32"):
    """Returns a bound on |polynomial(w) - e^w| e^-|w| for every |w| <= z."""
    table = {n: (reach, c) for n, reach, c in _table(dtype)}
    if num_terms not in table:
        return taylor_remainder(num_terms, z)
    reach, coefficients = table[num_terms]
    if z <= reach:
        return _fitted_error(reach, coefficients)
    p = np.arange(num_terms)
    logs = p * np.log(z) - np.array([math.lgamma(n + 1) for n in p]) - z
    change = np.abs(np.array(coefficients) - 1)
    return float(np.sum(change * np.exp(logs)) + taylor_remainder(num_terms, z))


@functools.cache
def _fitted_error(reach, coefficients):
    """Largest weighted error of a fitted polynomial over its reach."""
    w = np.linspace(-reach, reach, 20001)
    total = np.zeros_like(w)
    for p, c in enumerate(coefficients):
        with np.errstate(divide="ignore"):
            log = p * np.log(np.abs(w)) if p else np.zeros_like(w)
        total += c * np.sign(w) ** p * np.exp(log - math.lgamma(p + 1) - np.abs(w))
    return float(np.max(np.abs(total - np.exp(w - np.abs(w)))))


class Frame(NamedTuple):
    """What the series are relative to, by channel: tensors `(batch, 1, d)`."""

    middle: Any  # of the keys
    half: Any  # of the range of the keys
    mean: Any  # of the values


def half_range(low, high):
    """Returns half the range of the keys."""
    # Constant keys: any range will do, and a small one needs few terms.
    return ops.maximum(high / 2 - low / 2, 1e-20)


def finite_mean(total, count):
    """Returns the mean, zero where it is not finite: infinities stay as they are."""
    mean = total / count
    return ops.where(ops.isfinite(mean), mean, ops.zeros_like(mean))


def frame(key, value, key_mask):
    """Returns the `Frame` of keys and values; `key_mask` may be `None`."""
    if key_mask is None:
        low, high = (f(key, axis=1, keepdims=True) for f in (ops.min, ops.max))
        count = ops.shape(value)[1]
    else:
        low, high = key_limits(key, key_mask)
        count = ops.maximum(ops.sum(key_mask, axis=1, keepdims=True), 1.0)
    total = ops.sum(value, axis=1, keepdims=True)
    mean = finite_mean(total, ops.cast(count, value.dtype))
    return Frame(low / 2 + high / 2, half_range(low, high), mean)


def key_sums(moments, key, value, key_mask, frame, size):
    """Returns the coefficients of both series, and of their derivatives.

    Args:
        moments: `weighted_moments` of `_tiles` or `_wide`.
        key: float tensor of shape `(batch, keys, d)`, zero where masked.
        value: float tensor of the same shape, zero where masked.
        key_mask: float tensor of shape `(batch, keys, 1)`, ones and zeros, or `None`.
        frame: A `Frame`.
        size: One of `sizes()`.
    """

    def make(key, value, *masks):
        x, y, ones = (key - frame.middle) / frame.half, value - frame.mean, None
        for mask in masks:
            x, y, ones = x * mask, y * mask, ops.ones_like(y) * mask
        return x, (ones, y)

    tensors = [key, value] if key_mask is None else [key, value, key_mask]
    # One more than the series has terms: the derivative starts at the second.
    lower, *others = moments(make, tensors, size[2])
    return never_zero(lower), *others


def never_zero(lower):
    """Returns the denominator's coefficients, the first one where all are zero.

    That is, without any valid key; the output is zero then.
    """
    first = np.arange(lower.shape[0]) == 0
    first = np.reshape(first, (-1, *[1] * (len(lower.shape) - 1)))
    empty = ops.logical_and(first, lower == 0)
    return ops.where(empty, ops.ones_like(lower), lower)


def halves(series, x):
    """Returns the even and the odd part of each `sum_p coefficients[p] x^p`.

    Args:
        series: List of tensors of coefficients, all of the same shape.
        x: Tensor whose shape that of a coefficient can be broadcast to.
    """
    square = x * x
    if series[0].shape[0] > UNROLLED:
        parts = _by_loop([c[first::2] for c in series for first in (0, 1)], square)
    else:
        series = map(ops.unstack, series)
        parts = [_horner(c[first::2], square) for c in series for first in (0, 1)]
    return [(even, x * odd) for even, odd in zip(parts[0::2], parts[1::2])]


def evaluate(series, x):
    """Returns each `sum_p coefficients[p] x^p`; arguments as of `halves`."""
    if series[0].shape[0] > UNROLLED:
        return _by_loop(series, x)
    return [even + odd for even, odd in halves(series, x)]


def _by_loop(series, x):
    """Returns each `sum_p coefficients[p] x^p`, `STRIDE` terms of all at a time.

    No series may be longer than the first.
    """
    steps = -(-series[0].shape[0] // STRIDE)
    number, shape = len(series), ops.shape(series[0])[1:]
    rest = [(0, 0)] * len(shape)
    padded = [ops.pad(c, [(0, steps * STRIDE - c.shape[0]), *rest]) for c in series]
    table = ops.reshape(ops.stack(padded, axis=1), (steps, STRIDE, number, *shape))

    def body(index, sums):
        start = steps - 1 - index, *[0] * (2 + len(shape))
        taken = ops.slice(table, start, (1, STRIDE, number, *shape))
        return (_horner(ops.unstack(taken[0]), x, sums[0]),)

    zeros = ops.zeros((number, *ops.shape(x)), x.dtype)
    return ops.unstack(loop(steps, body, (zeros,))[0], number)


def _horner(coefficients, x, result=None):
    """Returns the polynomial of all n coefficients, plus `result x^n` if given."""
    if result is None:
        *coefficients, last = coefficients or [0.0]
        result = ops.zeros_like(x) + last
    for coefficient in coefficients[::-1]:
        result = result * x + coefficient
    return result


def scaled(query, frame, size):
    """Returns the queries as the series take them."""
    return query * (frame.half / size[1])


def outputs(query, sums, frame, size):
    """Returns the outputs for centred values, and what `fits` does."""
    s = scaled(query, frame, size)
    denominator, numerator = halves(sums[:2], s)
    kept = check_fit(*denominator, s, sums[1][0])
    return ops.add(*numerator) / ops.add(*denominator), kept


def fits(query, sums, frame, size):
    """Returns whether the series is exact enough, by channel, `(batch, 1, d)`."""
    s = scaled(query, frame, size)
    return check_fit(*halves(sums[:1], s)[0], s, sums[1][0])


def check_fit(even, odd, s, total):
    """Returns whether a series is exact enough, by channel.

    Args:
        even: Even part of the denominator at each scaled query.
        odd: Odd part, of the same shape.
        s: Scaled queries, of the same shape.
        total: Sum of the values, by channel.

    Of shapes `(batch, queries, d)` and `(batch, 1, d)`, or `(channels, queries)` and
    `(channels, 1)`.
    """
    # Comparisons that NaN fails. A sum, since XLA for CPUs makes a branch for each
    # element of a choice between a long expression and a number.
    outside = ops.where(ops.abs(s) <= 1, ops.zeros_like(s), float("inf"))
    # At the negative of a query, what alternates here has the same sign.
    ratio = (even - odd) / (even + odd)
    ratio = ratio * ratio + outside
    if len(s.shape) == 3:
        # A product with ones: XLA for CPUs makes more of it than of a sum over rows.
        ones = ops.ones_like(ratio[:, :, :1])
        cancellation = ops.matmul(ops.transpose(ones, (0, 2, 1)), ratio)
    else:
        cancellation = ops.sum(ratio, axis=1, keepdims=True)
    limit = MAX_CANCELLATION**2 * ops.cast(ops.shape(s)[1], s.dtype)
    return ops.logical_and(cancellation <= limit, ops.isfinite(total))


def gradients(
    moments, query, key, value, key_mask, sums, frame, output, upstream, size
):
    """Returns the gradients of query, key and value; masked ones are not zeroed."""
    _, reach, scales = size
    half = frame.half
    shifted, value = (key - frame.middle) / half, value - frame.mean
    if key_mask is not None:
        shifted = shifted * key_mask
    s = scaled(query, frame, size)
    denominator, first, second = evaluate((sums[0], *sums[2:]), s)
    factor = upstream / denominator
    slope = second - output * first

    def make(query, factor, output):
        return scaled(query, frame, size), (factor, factor * output)

    h, _, *slopes = moments(make, [query, factor, output], scales)
    slopes, y_slopes, to_value = evaluate((*slopes, h), shifted)
    to_key = (value * slopes - y_slopes) * (reach / half)
    return factor * half * slope, to_key, to_value
