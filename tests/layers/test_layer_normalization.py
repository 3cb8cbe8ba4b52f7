import keras
import numpy as np
import pytest
from keras import ops

from tests.contract import (
    assert_close,
    functional_model,
    gradients,
    random_like,
    randomize_weights,
    run_layer_contract,
)
from tokenlearner_keras.layers import _layer_normalization
from tokenlearner_keras.layers._layer_normalization import (
    LayerNormalization,
    normalize_by_products,
)

SHAPES = [(2, 5, 24), (3, 16), (2, 3, 4, 5, 8), (1, 1, 7)]


def test_contract(tmp_path):
    run_layer_contract(
        # Keras makes a list of `axis` when it builds.
        lambda **kwargs: LayerNormalization(axis=[-1], epsilon=1e-6, **kwargs),
        (2, 5, 24),
        (2, 5, 24),
        tmp_path,
        num_weights=48,
    )


@pytest.fixture
def by_products(monkeypatch):
    """Makes the layer take its other form everywhere; lists the inputs' shapes."""
    shapes = []

    def normalize(x, *arguments):
        shapes.append(tuple(x.shape))
        return normalize_by_products(x, *arguments)

    monkeypatch.setattr(_layer_normalization, "compiled_for_cpu", lambda: True)
    monkeypatch.setattr(_layer_normalization, "normalize_by_products", normalize)
    return shapes


def pair(shape, dtype):
    """Our layer and Keras's with the same weights, and as models after a `Dense`.

    The gradient of the `Dense` kernel shows the gradient with respect to the input.
    """
    models = []
    for make in (LayerNormalization, keras.layers.LayerNormalization):
        inputs = keras.Input(batch_shape=shape)
        x = keras.layers.Dense(shape[-1], dtype=dtype, name="dense")(inputs)
        model = keras.Model(inputs, make(epsilon=1e-6, dtype=dtype, name="norm")(x))
        randomize_weights(model)
        models.append(model)
    return models


@pytest.mark.backends
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "rtol"), [("float32", 2e-6), ("mixed_bfloat16", 1e-2)]
)
def test_products_equal_keras(shape, dtype, rtol, by_products):
    ours, theirs = pair(shape, dtype)
    by_products.clear()
    x = random_like(shape)
    assert_close(ours(x), theirs(x), rtol, "values")
    assert by_products == [shape]
    assert ours(x).dtype == theirs(x).dtype
    actual = gradients(ours, x)
    for path, gradient in gradients(theirs, x).items():
        assert_close(actual[path], gradient, 2 * rtol, path)


def test_products_of_offset_inputs(by_products):
    # The mean is taken off before squaring, so that an offset costs what it costs Keras.
    x = random_like((4, 64)) + 1000
    exact = x.astype("float64") - x.astype("float64").mean(-1, keepdims=True)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    assert_close(LayerNormalization(epsilon=1e-6)(x), exact, 1e-4)
    assert by_products == [(4, 64)]


@pytest.mark.parametrize(
    "arguments", [{"axis": [1, 2]}, {"scale": False}, {"center": False}]
)
def test_what_products_do_not_cover_is_keras(arguments, by_products):
    x = random_like((2, 5, 24))
    expected = keras.layers.LayerNormalization(**arguments)(x)
    assert_close(LayerNormalization(**arguments)(x), expected, 0)
    assert not by_products


def test_config_and_weights_are_keras():
    ours, theirs = (
        make(epsilon=1e-6, name="norm")
        for make in (LayerNormalization, keras.layers.LayerNormalization)
    )
    for layer in (ours, theirs):
        layer.build((None, 8))
    assert ours.get_config() == theirs.get_config()
    assert [v.path for v in ours.weights] == [v.path for v in theirs.weights]


@pytest.mark.tensorflow
def test_products_under_xla_only(monkeypatch):
    import tensorflow as tf

    calls = []
    monkeypatch.setattr(
        _layer_normalization,
        "normalize_by_products",
        lambda *args: calls.append(1) or normalize_by_products(*args),
    )
    layer = LayerNormalization(epsilon=1e-6)
    model = functional_model(layer, (2, 5, 24))
    randomize_weights(model)
    x = random_like((2, 5, 24))
    eager = model(x)
    graph = tf.function(lambda x: model(x))(x)
    assert not calls
    compiled = tf.function(lambda x: model(x), jit_compile=True)(x)
    assert calls == [1]
    assert_close(graph, eager, 1e-6)
    assert_close(compiled, eager, 1e-6)


@pytest.mark.tensorflow
def test_second_derivative():
    import tensorflow as tf

    x, gamma, beta = (tf.constant(random_like(s)) for s in ((3, 8), (8,), (8,)))

    def penalty(form):
        with tf.GradientTape() as outer:
            outer.watch([x, gamma])
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(tf.sin(form(x, gamma, beta)))
            slope = inner.gradient(loss, x)
            total = tf.reduce_sum(slope * slope)
        return outer.gradient(total, [x, gamma])

    ours = penalty(lambda *args: normalize_by_products(*args, 1e-3))
    theirs = penalty(lambda *args: ops.layer_normalization(*args, -1, 1e-3))
    assert_close(ours, theirs, 1e-5)
