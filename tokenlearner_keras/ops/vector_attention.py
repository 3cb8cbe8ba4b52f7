"""Vector attention (equation 2 of the paper) as a pure function."""

import contextlib
import contextvars

from keras import ops

METHODS = ("auto", "dense", "streaming", "interpolated")

_forced_method = contextvars.ContextVar("vector_attention_method", default=None)


@contextlib.contextmanager
def force_vector_attention_method(method: str):
    """Overrides `method="auto"` of every vector attention called or traced inside.

    A call that names another method keeps it.

    Args:
        method: One of `"auto"`, `"dense"`, `"streaming"` and `"interpolated"`.

    Raises:
        ValueError: for another name.

    Example:

    >>> with force_vector_attention_method("dense"):
    ...     outputs = model(inputs)
    """
    token = _forced_method.set(_check_method(method))
    try:
        yield
    finally:
        _forced_method.reset(token)


def vector_attention(query, key, value, mask=None, scale=1.0, method="auto"):
    method = _check_method(method)
    if method == "auto":
        method = _forced_method.get() or "auto"
    if method == "dense":
        return dense(query, key, value, mask, scale)[0]
    return streaming(query, key, value, mask, scale)


def dense(query, key, value, mask=None, scale=1.0):
    """The definition: returns the outputs and the pair tensor of weights."""
    logits = ops.multiply(query[:, :, None], key[:, None])
    logits = ops.multiply(logits, scale)
    if mask is not None:
        mask = _pair_mask(mask)
        logits = ops.where(mask, logits, ops.full_like(logits, -1e30))
    weights = ops.softmax(logits, axis=2)
    if mask is not None:
        weights = ops.where(mask, weights, ops.zeros_like(weights))
    return ops.sum(ops.multiply(weights, value[:, None]), axis=2), weights


def streaming(query, key, value, mask, scale):
    return dense(query, key, value, mask, scale)[0]


def _pair_mask(mask):
    mask = ops.cast(mask, "bool")
    return mask[:, None, :, None] if len(mask.shape) == 2 else mask[..., None]


def _check_method(method):
    if method not in METHODS:
        raise ValueError(
            "Invalid value for argument `method`. Expected one of "
            f"{METHODS}. Received: method={method!r}"
        )
    return method
