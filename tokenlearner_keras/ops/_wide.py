"""The moments of `ops/_series.py`, with all powers at once: what suits XLA on a GPU.

One kernel computes the powers of all tokens and sums them; they are never stored. The
tokens come last, so that the threads of a warp share the coefficients of a channel:
what evaluates a series takes a fifth of the time then. The functions of `_series` take
tensors that have gone through `enter`.
"""

import keras
from keras import ops


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


def weighted_moments(make, tensors, weights):
    """As that of `_tiles`, for tensors `(batch * d, tokens)`.

    Powers by logarithms err by at most about half of float rounding at one.
    """
    x, factors = make(*tensors)
    count = len(weights) + 1
    exponents = ops.reshape(ops.arange(count), (count, 1, 1))
    size = ops.log(ops.maximum(ops.abs(x), 1e-37))
    powers = ops.exp(ops.cast(exponents, x.dtype) * size)
    negative = ops.logical_and(ops.equal(exponents % 2, 1), x < 0)
    powers = ops.where(negative, -powers, powers)
    sums = [
        ops.sum(powers if y is None else powers * y, axis=2, keepdims=True)
        for y in factors
    ]
    weights = ops.reshape(ops.convert_to_tensor(weights, x.dtype), (-1, 1, 1))
    return [
        weights * part for part in (*(m[:-1] for m in sums), *(m[1:] for m in sums))
    ]
