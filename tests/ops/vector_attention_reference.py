"""Float64 reference of vector attention, and gradients on any backend."""

import functools

import keras
import numpy as np
from keras import ops

from tokenlearner_keras.ops import vector_attention

BACKEND = keras.backend.backend()


def reference(query, key, value, upstream, mask=None):
    """Output and gradients by query, key and value, NumPy float64, channel by channel."""
    arrays = [np.asarray(x, "float64") for x in (query, key, value, upstream)]
    query, key, value, upstream = arrays
    outputs = [np.zeros_like(query), np.zeros_like(query)]
    outputs += [np.zeros_like(key), np.zeros_like(value)]
    for b in range(query.shape[0]):
        valid = np.ones((query.shape[1], key.shape[1]), bool)
        if mask is not None:
            valid &= np.asarray(mask[b], bool)
        for c in range(query.shape[2]):
            q, k, v, g = (x[b, :, c] for x in arrays)
            logits = np.where(valid, q[:, None] * k, -np.inf)
            top = logits.max(1, keepdims=True)
            weights = np.exp(logits - np.where(np.isfinite(top), top, 0))
            weights /= np.maximum(weights.sum(1, keepdims=True), 1e-300)
            y = weights @ v
            inner = weights * g[:, None] * (v - y[:, None])
            outputs[0][b, :, c] = y
            # Centred keys: the sum over j of `inner` is zero.
            outputs[1][b, :, c] = inner @ (k - k.mean())
            outputs[2][b, :, c] = inner.T @ q
            outputs[3][b, :, c] = weights.T @ g
    return outputs


@functools.cache
def _tensorflow_runner(jit, arguments):
    import tensorflow as tf

    return tf.function(
        lambda *x: _tensorflow_run(*x, **dict(arguments)), jit_compile=jit or None
    )


def _tensorflow_run(query, key, value, upstream, **arguments):
    import tensorflow as tf

    tensors = (query, key, value)
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        output = vector_attention(*tensors, **arguments)
    return output, *tape.gradient(output, tensors, upstream)


def value_and_gradients(query, key, value, upstream, jit=False, **arguments):
    """Output and gradients by query, key and value of `vector_attention`."""

    def attention(*tensors):
        return vector_attention(*tensors, **arguments)

    tensors = [ops.convert_to_tensor(x) for x in (query, key, value)]
    upstream = ops.convert_to_tensor(upstream)
    if BACKEND == "tensorflow":
        # A graph, kept from call to call, where single operations would be too many.
        if jit or (query.shape[1] >= 256 and arguments.get("mask") is None):
            arguments = {k: v for k, v in arguments.items() if v is not None}
            run = _tensorflow_runner(jit, tuple(sorted(arguments.items())))
            results = run(*tensors, upstream)
        else:
            results = _tensorflow_run(*tensors, upstream, **arguments)
    elif BACKEND == "jax":
        import jax

        def run(*tensors):
            output, pullback = jax.vjp(attention, *tensors)
            return output, *pullback(upstream)

        results = (jax.jit(run) if jit else run)(*tensors)
    else:
        tensors = [x.detach().requires_grad_(True) for x in tensors]
        output = attention(*tensors)
        output.backward(upstream)
        results = [output, *(x.grad for x in tensors)]
    return [
        np.asarray(
            ops.convert_to_numpy(
                ops.cast(
                    x,
                    "float64"
                    if str(keras.backend.standardize_dtype(x.dtype)) == "float64"
                    else "float32",
                )
            )
        )
        for x in results
    ]


def relative_errors(actual, expected):
    """Relative 2-norm errors; absolute ones where the expected array is zero."""
    errors = []
    for a, e in zip(actual, expected, strict=True):
        norm = np.linalg.norm(e)
        scale = norm if norm > 1e-12 * np.sqrt(e.size) else np.sqrt(e.size)
        errors.append(float(np.linalg.norm(a.astype("float64") - e) / scale))
    return errors


def assert_accurate(query, key, value, methods=("auto",), mask=None, seed=0, jit=False):
    """At most 1e-5, or twice the error of float32 `dense`."""
    upstream = np.random.default_rng(seed).standard_normal(query.shape)
    arguments = query, key, value, upstream.astype("float32")
    pairs = None if mask is None else (mask if mask.ndim == 3 else mask[:, None])
    expected = reference(*arguments, pairs)
    dense = relative_errors(
        value_and_gradients(*arguments, method="dense", mask=mask), expected
    )
    for method in methods:
        errors = relative_errors(
            value_and_gradients(*arguments, jit=jit, method=method, mask=mask), expected
        )
        for name, error, limit in zip(("value", "dq", "dk", "dv"), errors, dense):
            assert error <= max(1e-5, 2 * limit), (method, name, error, limit)
