"""Vector attention in linear time: power series and moments.

For one channel, with keys centred on the middle of their range, `t_j = (k_j - c) / r`
in [-1, 1] and `s_i = q_i r / Z`,

    sum_j e^(q_i k_j) v_j  ~  sum_p a_p s_i^p M_p,    M_p = sum_j t_j^p v_j,

where `a_p = c_p Z^p / p!` are the coefficients of a polynomial close to `e^(Z s)`.
"""

import functools
import math

import keras
import numpy as np
from keras import ops

from tokenlearner_keras.ops._coefficients import COEFFICIENTS
from tokenlearner_keras.ops._streaming import key_limits

# Where alternating terms cancel by more than this (root mean square over the queries
# of one channel), float32 would lose more than a relative 1e-5.
MAX_CANCELLATION = 16.0


@functools.cache
def sizes(dtype="float32"):
    """Returns the compiled sizes: tuples of terms, reach and series coefficients."""
    if dtype != "float64":
        return tuple((n, z, _scaled(c, z)) for n, z, c in COEFFICIENTS)
    return tuple(
        (n, z, _scaled((1.0,) * n, z))
        for n, z in ((n, taylor_reach(n, 2.0**-52)) for n in (24, 48, 96))
    )


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
    """Returns the size with `num_terms` terms."""
    for found in sizes(dtype):
        if found[0] == num_terms:
            return found
    reach = taylor_reach(num_terms, 2.0**-52 if dtype == "float64" else 2.0**-23)
    return num_terms, reach, _scaled((1.0,) * num_terms, reach)


def geometry(query, key, key_mask):
    """Returns `z`, the middle and half the range of the keys, and `t`, by channel."""
    low, high = key_limits(key, key_mask)
    middle = low / 2 + high / 2
    # Constant keys: any range will do, and a small one needs few terms.
    half = ops.maximum(high / 2 - low / 2, 1e-20)
    shifted = (key - middle) / half * key_mask
    z = ops.max(ops.abs(query), axis=1, keepdims=True) * half
    return z, middle, half, shifted


def powers_sums(x, first, second, count):
    """Returns `[sum x^p first]` and `[sum x^p second]` over axis 1, p < `count`."""
    form = _powers_sums_form(x)
    if form == "kernel":
        from tokenlearner_keras.ops import _pallas

        sums = _pallas.moments(x, first, second, count)
        return tuple([s[:, p : p + 1] for p in range(count)] for s in sums)
    if form == "stacked":
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


def _powers_sums_form(x):
    """Returns the form of `powers_sums` that is fastest on the device at hand."""
    backend = keras.backend.backend()
    if backend == "jax":
        from tokenlearner_keras.ops import _pallas

        if _pallas.supported(x):
            return "kernel"
    if backend == "tensorflow":
        import tensorflow as tf

        # Without a compiler the stack would be stored.
        if not tf.executing_eagerly() and tf.config.list_logical_devices("GPU"):
            return "stacked"
    return "separate"


def evaluate(coefficients, x):
    """Returns the polynomial `sum_p coefficients[p] x^p` by Horner's rule."""
    result = coefficients[-1] + ops.zeros_like(x)
    for c in coefficients[-2::-1]:
        result = result * x + c
    return result


def forward(query, shifted_key, value, key_mask, center_range, size):
    """Returns outputs, denominators, slopes and squared cancellations.

    Args:
        query: float tensor of shape `(batch, queries, d)`, scaled.
        shifted_key: `t`, keys in [-1, 1], zero where masked.
        value: Values, centred, zero where masked.
        key_mask: float tensor that broadcasts to the keys.
        center_range: `r`, tensor of shape `(batch, 1, d)`.
        size: One of `sizes()`.
    """
    count, reach, scales = size
    s = query * (center_range / reach)
    ones = key_mask + ops.zeros_like(value)
    m0, m1 = powers_sums(shifted_key, ones, value, count + 1)
    square = s * s
    c0 = [a * m for a, m in zip(scales, m0)]
    even, odd = evaluate(c0[0::2], square), s * evaluate(c0[1::2], square)
    # The sum at -s, with which every alternating term has the same sign.
    denominator, reverse = even + odd, even - odd
    empty = m0[0] == 0
    denominator = ops.where(empty, ops.ones_like(denominator), denominator)
    cancellation = reverse / denominator
    cancellation = ops.mean(cancellation * cancellation, axis=1, keepdims=True)
    output = evaluate([a * m for a, m in zip(scales, m1)], s) / denominator
    slope = evaluate([a * m for a, m in zip(scales, m1[1:])], s)
    slope = slope - output * evaluate([a * m for a, m in zip(scales, m0[1:])], s)
    slope = slope * center_range / denominator
    return output, denominator, slope, cancellation


def backward(query, shifted_key, output, factor, center_range, size):
    """Returns the sums over the queries that the gradients of key and value need."""
    count, reach, scales = size
    s = query * (center_range / reach)
    h, hy = powers_sums(s, factor, factor * output, count + 1)
    to_query = reach / center_range
    return (
        evaluate([a * m for a, m in zip(scales, h)], shifted_key),
        evaluate([a * m for a, m in zip(scales, h[1:])], shifted_key) * to_query,
        evaluate([a * m for a, m in zip(scales, hy[1:])], shifted_key) * to_query,
    )


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
