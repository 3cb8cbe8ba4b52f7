import keras
import numpy as np
import pytest
from keras import ops

from tests.contract import (
    assert_close,
    random_like,
    randomize_weights,
    run_layer_contract,
)
from tokenlearner_keras.layers import _batch_normalization
from tokenlearner_keras.layers._batch_normalization import (
    BatchNormalization,
    normalize_batch,
)

SHAPES = [(6, 8), (2, 3, 4, 8), (2, 3, 4, 4, 8)]


def test_contract(tmp_path):
    run_layer_contract(
        BatchNormalization, (4, 5, 24), (4, 5, 24), tmp_path, num_weights=48
    )


def pair(dtype=None, **arguments):
    """Our layer and Keras's, as functions with the same weights."""
    layers = [
        make(momentum=0.9, epsilon=1e-5, dtype=dtype, name="norm", **arguments)
        for make in (BatchNormalization, keras.layers.BatchNormalization)
    ]
    return layers


def train(layer, x, upstream):
    """Outputs in training, and the gradients of input, gamma and beta."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x, training=True)
        variables = [v.value for v in layer.trainable_variables]
        return outputs, *tape.gradient(outputs, [x, *variables], upstream)
    if backend == "jax":
        import jax

        def call(x, *trainable):
            return layer.stateless_call(
                trainable, [v.value for v in layer.non_trainable_variables], x,
                training=True,
            )  # fmt: skip

        outputs, pullback, states = jax.vjp(
            call, x, *(v.value for v in layer.trainable_variables), has_aux=True
        )
        for variable, state in zip(layer.non_trainable_variables, states):
            variable.assign(state)
        return outputs, *pullback(upstream)
    x = x.clone().requires_grad_(True)
    outputs = layer(x, training=True)
    variables = [v.value for v in layer.trainable_variables]
    import torch

    return outputs, *torch.autograd.grad(outputs, [x, *variables], upstream)


@pytest.mark.backends
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "rtol"), [("float32", 1e-5), ("mixed_bfloat16", 1e-2)]
)
@pytest.mark.parametrize("axis", [-1, 1])
def test_equals_keras(shape, dtype, rtol, axis):
    layers = pair(dtype, axis=axis)
    results = []
    for layer in layers:
        layer.build(shape)
        randomize_weights(layer)
        x, upstream = (
            ops.cast(random_like(shape, seed), layer.compute_dtype) for seed in (1, 2)
        )
        results.append((*train(layer, x, upstream), *layer.non_trainable_variables))
        results[-1] += (layer(x, training=False),)
    names = "outputs", "to x", "to gamma", "to beta", "mean", "variance", "inference"
    assert len(results[0]) == len(names)
    for name, ours, theirs in zip(names, *results):
        assert keras.backend.standardize_dtype(
            ours.dtype
        ) == keras.backend.standardize_dtype(theirs.dtype), name
        assert_close(ours, theirs, rtol, name)


def test_inputs_far_from_zero():
    """Beside a moving mean that has followed, an offset costs nothing."""
    x = random_like((512, 8)) + 1000
    layer = BatchNormalization(momentum=0.0, epsilon=1e-6)
    layer(x, training=True)
    exact = x.astype("float64") - x.astype("float64").mean(0)
    exact /= np.sqrt((exact**2).mean(0) + 1e-6)
    assert_close(layer(x, training=True), exact, 2e-4)


def test_constant_inputs_are_finite():
    x = np.full((4, 8), 3.1e4, "float32")
    layer = BatchNormalization(epsilon=1e-5)
    outputs = ops.convert_to_numpy(layer(x, training=True))
    assert np.all(np.isfinite(outputs))
    assert np.all(ops.convert_to_numpy(layer.moving_variance) >= 0)


@pytest.mark.parametrize(
    "arguments", [{"scale": False}, {"center": False}, {"trainable": False}]
)
def test_the_rest_is_keras(arguments, monkeypatch):
    monkeypatch.setattr(
        _batch_normalization, "normalize_batch", lambda *args: pytest.fail("called")
    )
    ours, theirs = pair(**arguments)
    x = random_like((4, 8))
    assert_close(ours(x, training=True), theirs(x, training=True), 0)


def test_config_and_weights_are_keras():
    ours, theirs = pair()
    for layer in (ours, theirs):
        layer.build((None, 8))
    assert ours.get_config() == theirs.get_config()
    assert [v.path for v in ours.weights] == [v.path for v in theirs.weights]


@pytest.mark.tensorflow
def test_unknown_sizes_and_second_derivative():
    import tensorflow as tf

    x, gamma, beta, shift = (
        tf.constant(random_like(shape)) for shape in ((6, 8), (8,), (8,), (8,))
    )

    def ours(x):
        return normalize_batch(x, gamma, beta, shift, [0], 1e-5, "float32")

    def plain(x):
        mean, variance = tf.nn.moments(x, [0])
        return tf.nn.batch_normalization(x, mean, variance, beta, gamma, 1e-5)

    def second(form):
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(form(x) ** 3)
            slope = tf.reduce_sum(inner.gradient(loss, x) ** 2)
        return outer.gradient(slope, x)

    assert_close(second(ours), second(plain), 1e-4)
    unknown = tf.function(ours, input_signature=[tf.TensorSpec((None, 8))])
    assert_close(unknown(x), plain(x), 1e-5)
