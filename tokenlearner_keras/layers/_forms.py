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
    """Returns whether a form for GPUs may be taken: the backend computes on one."""
    if is_literal():
        return False
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.default_backend() == "gpu"
    if backend == "tensorflow":
        import tensorflow as tf

        return bool(tf.config.list_logical_devices("GPU"))
    return False


def compiled_for_cpu() -> bool:
    """Returns whether TensorFlow traces a program that XLA compiles for a CPU.

    Not on JAX: it traces for a device that it may not know yet.
    """
    if keras.backend.backend() != "tensorflow" or is_literal():
        return False
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    # TensorFlow's own loops ask this; there is no public way to.
    return (
        not tf.executing_eagerly()
        and control_flow_util.GraphOrParentsInXlaContext(
            tf.compat.v1.get_default_graph()
        )
        and all(
            device.device_type == "CPU" for device in tf.config.list_logical_devices()
        )
    )
