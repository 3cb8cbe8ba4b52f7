"""Where a layer may compute what it is defined as in another, faster form."""

import contextlib
import contextvars
from collections.abc import Iterator

import keras

_literal = contextvars.ContextVar("literal_definitions", default=False)


@contextlib.contextmanager
def literal_definitions() -> Iterator[None]:
    """Lets layers compute literally what they are defined as, to count operations."""
    token = _literal.set(True)
    try:
        yield
    finally:
        _literal.reset(token)


def is_literal() -> bool:
    return _literal.get()


def on_gpu() -> bool:
    """Returns whether the backend's compiler works for a GPU."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.default_backend() == "gpu"
    if backend == "tensorflow":
        import tensorflow as tf

        return bool(tf.config.list_logical_devices("GPU"))
    return False
