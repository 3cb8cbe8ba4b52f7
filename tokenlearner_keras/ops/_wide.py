"""The series of `ops/_series.py`, with all powers at once: what suits XLA on a GPU.

One kernel computes the powers of all tokens and sums them; they are never stored. The
tokens come last, so that the threads of a warp share the coefficients of a channel:
what evaluates a series takes a fifth of the time then. The functions are those of
`_tiles`, for tensors that have gone through `enter`.
"""

import keras
from keras import ops

from tokenlearner_keras.ops import _tiles

frame = _tiles.frame
outputs = _tiles.outputs
fits = _tiles.fits


def is_best():
    """Returns whether this form is the one to trace. On JAX, `_fused` takes the work.

    Without a compiler the powers would be stored.
    """
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly() and bool(tf.config.list_logical_devices("GPU"))


def enter(x, channels):
    """Returns `(batch, tokens, d)` as `(batch * d, tokens)`.

    Of two axes, since XLA would else keep the order in memory and call it another. A
    single channel, such as a mask's, becomes `channels`.
    """
    x = ops.transpose(x, (0, 2, 1))
    if x.shape[1] != channels:
        batch, _, tokens = ops.shape(x)
        x = ops.broadcast_to(x, (batch, channels, tokens))
    return ops.reshape(x, (-1, ops.shape(x)[2]))


def leave(x, channels):
    """Returns `(batch * d, tokens)` as `(batch, tokens, d)`."""
    x = ops.reshape(x, (-1, channels, ops.shape(x)[1]))
    return ops.transpose(x, (0, 2, 1))


def key_sums(key, value, key_mask, frame, size):
    count, _, scales = size
    x, y = (key - frame.middle) / frame.half, value - frame.mean
    if key_mask is not None:
        x, y = x * key_mask, y * key_mask
    m0, m1 = _moments(x, (key_mask, y), count + 1)
    sums = (m0[:-1], m1[:-1], m0[1:], m1[1:])
    lower, *rest = (_column(scales, x) * part for part in sums)
    return _tiles.never_zero(lower), *rest


def gradients(query, key, value, key_mask, sums, frame, output, upstream, size):
    count, reach, scales = size
    shifted = (key - frame.middle) / frame.half
    if key_mask is not None:
        shifted = shifted * key_mask
    denominator, _, s = _tiles.denominators(query, sums, frame, size)
    factor = upstream / denominator
    slope = _tiles.evaluate(sums[3], s) - output * _tiles.evaluate(sums[2], s)
    h, hy = _moments(s, (factor, factor * output), count + 1)
    column = _column(scales, s)
    slopes, y_slopes = (_tiles.evaluate(column * x[1:], shifted) for x in (h, hy))
    to_key = ((value - frame.mean) * slopes - y_slopes) * (reach / frame.half)
    to_value = _tiles.evaluate(column * h[:-1], shifted)
    return factor * frame.half * slope, to_key, to_value


def _moments(x, factors, count):
    """Returns the sums of `x^p y` for each `y`, tensors `(count, batch * d, 1)`.

    A `y` of `None` is one. Powers by logarithms err by at most about half of float
    rounding at one.
    """
    exponents = ops.reshape(ops.arange(count), (count, 1, 1))
    size = ops.log(ops.maximum(ops.abs(x), 1e-37))
    powers = ops.exp(ops.cast(exponents, x.dtype) * size)
    negative = ops.logical_and(ops.equal(exponents % 2, 1), x < 0)
    powers = ops.where(negative, -powers, powers)
    return [
        ops.sum(powers if y is None else powers * y, axis=2, keepdims=True)
        for y in factors
    ]


def _column(numbers, like):
    return ops.reshape(ops.convert_to_tensor(numbers, like.dtype), (-1, 1, 1))
