"""Vector attention in linear time: power series and moments.

For one channel, with keys centred on the middle of their range, `t_j = (k_j - c) / r`
in [-1, 1] and `s_i = q_i r / Z`,

    sum_j e^(q_i k_j) v_j  ~  sum_p a_p s_i^p M_p,    M_p = sum_j t_j^p v_j,

where `a_p = c_p Z^p / p!` are the coefficients of a polynomial close to `e^(Z s)`.
"""

import functools
import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from tokenlearner_keras.ops import _tiles
from tokenlearner_keras.ops._backend import loop
from tokenlearner_keras.ops._coefficients import COEFFICIENTS
from tokenlearner_keras.ops._streaming import key_limits

# Where alternating terms cancel by more than this (root mean square over the queries
# of one channel), float32 would lose more than a relative 1e-5.
MAX_CANCELLATION = 16.0

# Of the compiled series, those of `"auto"`. The shortest is enough for 4096 tokens of
# unit scale in 432 channels.
AUTO_TERMS = (35, 64)


@functools.cache
def sizes(dtype="float32"):
    """Returns what `"auto"` compiles: terms, reach, coefficients, whether unrolled.

    Only the first is unrolled: it runs faster so, and the others compile faster as
    loops.
    """
    if dtype == "float64":
        reaches = [(n, taylor_reach(n, 2.0**-52)) for n in (48, 96)]
        table = [(n, z, (1.0,) * n) for n, z in reaches]
    else:
        table = [x for x in COEFFICIENTS if x[0] in AUTO_TERMS]
    return tuple((n, z, _scaled(c, z), i == 0) for i, (n, z, c) in enumerate(table))


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


def size(num_terms, dtype="float32"):
    """Returns the size with `num_terms` terms, unrolled."""
    for terms, reach, coefficients in COEFFICIENTS:
        if terms == num_terms and dtype != "float64":
            return num_terms, reach, _scaled(coefficients, reach), True
    reach = taylor_reach(num_terms, 2.0**-52 if dtype == "float64" else 2.0**-23)
    return num_terms, reach, _scaled((1.0,) * num_terms, reach), True


def geometry(query, key, key_mask):
    """Returns `z` and half the range of the keys, by channel, and `t`."""
    low, high = key_limits(key, key_mask)
    middle = low / 2 + high / 2
    half = half_range(low, high)
    shifted = (key - middle) / half * key_mask
    z = ops.max(ops.abs(query), axis=1, keepdims=True) * half
    return z, half, shifted


def half_range(low, high):
    """Returns half the range of the keys."""
    # Constant keys: any range will do, and a small one needs few terms.
    return ops.maximum(high / 2 - low / 2, 1e-20)


def powers_sums(x, first, second, count, unroll):
    """Returns the sums of `x^p first` and of `x^p second` over axis 1, p < `count`.

    Each is a list of tensors of shape `(batch, 1, d)`, or, not unrolled, a tensor of
    shape `(count, batch, 1, d)`.
    """
    if not unroll:
        return _powers_sums_loop(x, first, second, count)
    if _is_stacked():
        # On a GPU, XLA makes one kernel of this; the stack is never stored.
        powers = [ops.ones_like(x)]
        for _ in range(1, count):
            powers.append(powers[-1] * x)
        powers = ops.stack(powers)
        sums = (ops.sum(powers * y, axis=2, keepdims=True) for y in (first, second))
        return tuple([s[p] for p in range(count)] for s in sums)
    sums = ([], [])
    for p in range(count):
        if p > 0:
            first, second = first * x, second * x
        for total, y in zip(sums, (first, second)):
            total.append(ops.sum(y, axis=1, keepdims=True))
    return sums


def _powers_sums_loop(x, first, second, count):
    positions = ops.reshape(ops.arange(count), (count, 1, 1, 1))

    def body(index, carry):
        first, second, sums0, sums1 = carry
        here = ops.cast(positions == index, x.dtype)
        sums0 = sums0 + here * ops.sum(first, axis=1, keepdims=True)
        sums1 = sums1 + here * ops.sum(second, axis=1, keepdims=True)
        return first * x, second * x, sums0, sums1

    zeros = ops.zeros((count, *ops.shape(x)[:1], 1, *ops.shape(x)[2:]), x.dtype)
    return loop(count, body, (first, second, zeros, zeros))[2:]


def _is_stacked():
    """Returns whether `powers_sums` shall stack the powers: faster on TensorFlow GPUs.

    Without a compiler the stack would be stored. On JAX, `_fused` takes the work.
    """
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly() and bool(tf.config.list_logical_devices("GPU"))


def evaluate(scales, sums, x):
    """Returns the series `sum_p scales[p] sums[p] x^p` by Horner's rule."""
    unrolled = isinstance(sums, list)
    count = min(len(scales), len(sums) if unrolled else sums.shape[0])
    if unrolled:
        result = scales[count - 1] * sums[count - 1] + ops.zeros_like(x)
        for p in range(count - 2, -1, -1):
            result = result * x + scales[p] * sums[p]
        return result
    scales = ops.reshape(ops.convert_to_tensor(scales[:count], x.dtype), (-1, 1, 1, 1))
    terms = scales * sums[:count]

    def body(index, carry):
        return (carry[0] * x + ops.take(terms, count - 1 - index, axis=0),)

    return loop(count, body, (ops.zeros_like(x),))[0]


def moments(shifted_key, value, key_mask, size):
    """Returns the moments of ones and of the values, `(batch, 1, d)` each.

    Args:
        shifted_key: `t`, keys in [-1, 1], zero where masked.
        value: Values, centred, zero where masked.
        key_mask: float tensor of shape `(batch, keys, 1)`, ones and zeros.
        size: One of `sizes()`.
    """
    ones = key_mask + ops.zeros_like(value)
    # One more than the series has terms: the derivative starts at the second.
    return powers_sums(shifted_key, ones, value, size[0] + 1, size[3])


def forward(query, m0, m1, half, size):
    """Returns outputs and squared cancellations, a mean over the queries.

    Args:
        query: float tensor of shape `(batch, queries, d)`, scaled.
        m0: Moments of ones.
        m1: Moments of the values.
        half: `r`, half the range of the keys, of shape `(batch, 1, d)`.
        size: One of `sizes()`.
    """
    s, denominator, opposite = _denominators(query, m0, half, size)
    cancellation = opposite / denominator
    cancellation = ops.mean(cancellation * cancellation, axis=1, keepdims=True)
    output = evaluate(size[2], m1, s) / denominator
    return output, cancellation


def _denominators(query, m0, half, size):
    """Returns scaled queries, their denominators, and those of their negatives."""
    _, reach, scales, _ = size
    s = query * (half / reach)
    square = s * s
    even = evaluate(scales[0::2], m0[0:-1:2], square)
    odd = s * evaluate(scales[1::2], m0[1:-1:2], square)
    # At -s, what alternates at s has the same sign.
    return s, _denominator(even + odd, m0), even - odd


def backward(query, shifted_key, value, m0, m1, output, upstream, half, size):
    """Returns the gradients of query, key and value; masked ones are not zeroed."""
    count, reach, scales, unroll = size
    s = query * (half / reach)
    series = functools.partial(evaluate, scales)

    factor = upstream / _denominator(series(m0, s), m0)
    to_query = factor * half * (series(m1[1:], s) - output * series(m0[1:], s))
    h, hy = powers_sums(s, factor, factor * output, count + 1, unroll)
    to_key = value * series(h[1:], shifted_key) - series(hy[1:], shifted_key)
    return to_query, to_key * (reach / half), series(h, shifted_key)


class Frame(NamedTuple):
    """What the series are relative to, by channel: tensors `(batch, 1, d)`."""

    middle: Any  # of the keys
    half: Any  # of the range of the keys
    mean: Any  # of the values


def frame(key, value, key_mask):
    """Returns the `Frame` of keys and values; `key_mask` may be `None`."""
    if key_mask is None:
        signs = ops.reshape(ops.convert_to_tensor([1.0, -1.0], key.dtype), (2, 1, 1, 1))
        limits = _tiles.fold(key * signs, ops.maximum, ops.max)
        low, high = -limits[1], limits[0]
        total, count = _tiles.fold(value, ops.add, ops.sum), ops.shape(value)[1]
    else:
        low, high = key_limits(key, key_mask)
        total = ops.sum(value, axis=1, keepdims=True)
        count = ops.maximum(ops.sum(key_mask, axis=1, keepdims=True), 1.0)
    mean = finite_mean(total, ops.cast(count, value.dtype))
    return Frame(low / 2 + high / 2, half_range(low, high), mean)


def finite_mean(total, count):
    """Returns the mean, zero where it is not finite: infinities stay as they are."""
    mean = total / count
    return ops.where(ops.isfinite(mean), mean, ops.zeros_like(mean))


def key_sums(key, value, key_mask, frame, size):
    """Returns what the series need of the keys and values, a tuple of tensors.

    Args:
        key: float tensor of shape `(batch, keys, d)`, zero where masked.
        value: float tensor of the same shape, zero where masked.
        key_mask: float tensor of shape `(batch, keys, 1)`, ones and zeros, or `None`.
        frame: A `Frame`.
        size: One of `sizes()`.
    """
    if not _is_stacked():
        return _tiles.key_sums(key, value, key_mask, frame, size)
    mask = ops.ones_like(key[:, :, :1]) if key_mask is None else key_mask
    shifted = (key - frame.middle) / frame.half * mask
    m0, m1 = moments(shifted, (value - frame.mean) * mask, mask, size)
    return (*m0, *m1) if size[3] else (m0, m1)


def _split(sums, size):
    middle = len(sums) // 2
    return (list(sums[:middle]), list(sums[middle:])) if size[3] else sums


def fits(query, sums, frame, size):
    """Returns whether the series is exact enough for every channel, a boolean."""
    if _is_stacked():
        m0, m1 = _split(sums, size)
        s, denominator, opposite = _denominators(query, m0, frame.half, size)
        total = m1[0]
    else:
        denominator, opposite, s = _tiles.denominators(query, sums, frame, size)
        total = sums[1][0]
    ratio = opposite / denominator
    # Comparisons that NaN fails. A sum, since XLA for CPUs makes a branch for each
    # element of a choice between a long expression and a number.
    outside = ops.where(ops.abs(s) <= 1, ops.zeros_like(s), float("inf"))
    ratio = ratio * ratio + outside
    # A product with ones: XLA for CPUs makes more of it than of a sum over rows.
    ones = ops.ones_like(query[:, :, :1])
    cancellation = ops.matmul(ops.transpose(ones, (0, 2, 1)), ratio)
    limit = MAX_CANCELLATION**2 * ops.cast(ops.shape(query)[1], query.dtype)
    kept = ops.logical_and(cancellation <= limit, ops.isfinite(total))
    return ops.all(kept)


def outputs(query, sums, frame, size):
    """Returns the outputs for centred values."""
    if not _is_stacked():
        return _tiles.outputs(query, sums, frame, size)
    return forward(query, *_split(sums, size), frame.half, size)[0]


def gradients(query, key, value, key_mask, sums, frame, output, upstream, size):
    """Returns the gradients of query, key and value; masked ones are not zeroed."""
    shifted = (key - frame.middle) / frame.half
    if key_mask is not None:
        shifted = shifted * key_mask
    value = value - frame.mean
    tensors = query, shifted, value
    if not _is_stacked():
        return _tiles.gradients(*tensors, sums, frame, output, upstream, size)
    return backward(*tensors, *_split(sums, size), output, upstream, frame.half, size)


def _denominator(x, m0):
    # Without any valid key every sum is zero, and so is the output.
    return ops.where(m0[0] == 0, ops.ones_like(x), x)


def remainder(num_terms, z, dtype="float32"):
    """Returns a bound on |polynomial(w) - e^w| e^-|w| for every |w| <= z."""
    table = {n: (reach, c) for n, reach, c in COEFFICIENTS}
    if dtype == "float64" or num_terms not in table:
        return taylor_remainder(num_terms, z)
    reach, coefficients = table[num_terms]
    if z <= reach:
        return _fitted_error(num_terms)
    p = np.arange(num_terms)
    logs = p * np.log(z) - np.array([math.lgamma(n + 1) for n in p]) - z
    change = np.abs(np.array(coefficients) - 1)
    return float(np.sum(change * np.exp(logs)) + taylor_remainder(num_terms, z))


@functools.cache
def _fitted_error(num_terms):
    """Largest weighted error of a fitted polynomial over its reach."""
    reach, coefficients = next((z, c) for n, z, c in COEFFICIENTS if n == num_terms)
    w = np.linspace(-reach, reach, 20001)
    total = np.zeros_like(w)
    for p, c in enumerate(coefficients):
        with np.errstate(divide="ignore"):
            log = p * np.log(np.abs(w)) if p else np.zeros_like(w)
        total += c * np.sign(w) ** p * np.exp(log - math.lgamma(p + 1) - np.abs(w))
    return float(np.max(np.abs(total - np.exp(w - np.abs(w)))))
