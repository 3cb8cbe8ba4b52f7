import keras
import numpy as np
import pytest
from keras import ops

from tests.contract import (
    assert_close,
    functional_model,
    random_like,
    randomize_weights,
    run_layer_contract,
    to_numpy,
)
from tokenlearner_keras.layers import VectorAttention


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"method": "streaming", "output_projection": True, "use_bias": True, "dim": 6},
        {"method": "dense", "dim": 6, "value_dim": 4, "scale": 0.5},
        {"dim": 6, "value_dim": 4},
    ],
)
def test_contract(arguments, tmp_path):
    dim = arguments.get("dim", 8)
    value_dim = arguments.get("value_dim", dim)
    channels = 8 if arguments.get("output_projection") else value_dim

    def make_layer(**kwargs):
        return VectorAttention(**arguments, **kwargs)

    run_layer_contract(
        make_layer,
        (2, 5, 8),
        (2, 5, channels),
        tmp_path,
        zero_gradients=("key/bias",),
    )


def test_parameters_of_the_paper():
    layer = VectorAttention()
    layer.build((None, 512, 432))
    # TABLES.md, Tables 4 and 5: f_q, f_k and f_v, bias-free.
    assert [tuple(w.shape) for w in layer.weights] == [(432, 432)] * 3
    assert layer.count_params() == 559_872


@pytest.mark.parametrize("method", ["auto", "dense", "streaming", "interpolated"])
def test_equation_2(method):
    x = random_like((2, 7, 5))
    layer = VectorAttention(method=method)
    layer.build(x.shape)
    randomize_weights(layer)
    q, k, v = (x @ np.asarray(w) for w in layer.get_weights())
    weights = np.exp(q[:, :, None] * k[:, None])
    weights /= weights.sum(2, keepdims=True)
    expected = (weights * v[:, None]).sum(2)
    assert_close(layer(x), expected, 1e-5)


def test_gamma_projects_the_products():
    x = random_like((2, 9, 5))
    layer = VectorAttention(dim=6, value_dim=3)
    layer.build(x.shape)
    randomize_weights(layer)
    wq, wk, wv, gamma = layer.get_weights()
    assert gamma.shape == (6, 3)
    q, k, v = x @ wq, x @ wk, x @ wv
    weights = np.exp((q[:, :, None] * k[:, None]) @ gamma)
    weights /= weights.sum(2, keepdims=True)
    expected = (weights * v[:, None]).sum(2)
    assert_close(layer(x), expected, 1e-5)
    dense = VectorAttention(dim=6, value_dim=3, method="dense")
    dense.build(x.shape)
    dense.set_weights(layer.get_weights())
    outputs, scores = dense(x, return_attention_scores=True)
    assert_close(outputs, expected, 1e-5)
    assert_close(scores, weights, 1e-5)


def test_cross_attention_and_masks():
    query, value, key = (
        random_like(s, i) for i, s in enumerate(((2, 4, 5), (2, 6, 3), (2, 6, 7)))
    )
    layer = VectorAttention(dim=5)
    mask = np.array([[1, 1, 1, 0, 0, 0], [0] * 6], bool)
    outputs = np.asarray(to_numpy(layer(query, value, key, mask=mask))[0])
    assert outputs.shape == (2, 4, 5)
    assert_close(
        outputs[:1], layer(query[:1], value[:1, :3], key[:1, :3]), 1e-5, "first three"
    )
    np.testing.assert_array_equal(outputs[1], 0)
    pairs = np.broadcast_to(mask[:, None], (2, 4, 6))
    assert_close(layer(query, value, key, mask=pairs), outputs, 1e-5, "mask of pairs")


def test_keras_masks_reach_the_keys():
    inputs = np.array([[1, 2, 3, 0, 0]])
    embedding = keras.layers.Embedding(4, 6, mask_zero=True)
    layer = VectorAttention()
    x = embedding(inputs)
    outputs = layer(x)
    assert_close(outputs[:, :3], layer(ops.convert_to_tensor(to_numpy(x)[0][:, :3])))
    assert getattr(outputs, "_keras_mask", None) is not None


@pytest.mark.parametrize("method", ["auto", "dense"])
def test_dropout(method):
    x = random_like((1, 14, 30))
    layer = VectorAttention(dropout=0.5, method=method, seed=1)
    plain = to_numpy(layer(x, training=False))[0]
    first, second = (to_numpy(layer(x, training=True))[0] for _ in range(2))
    assert not np.allclose(first, plain)
    assert not np.allclose(first, second)
    # Every draw has the plain output as its mean.
    many = np.mean([to_numpy(layer(x, training=True))[0] for _ in range(20)], axis=0)
    single = np.linalg.norm(first - plain)
    assert np.linalg.norm(many - plain) < 0.4 * single


def test_dropout_is_the_same_in_both_methods():
    x = random_like((2, 11, 3))
    layers = [VectorAttention(dropout=0.3, method=m, seed=3) for m in ("auto", "dense")]
    for layer in layers:
        layer.build(x.shape)
    layers[1].set_weights(layers[0].get_weights())
    first, second = (layer(x, training=True) for layer in layers)
    assert_close(first, second, 1e-5)


def test_lora_and_quantization_reach_the_projections():
    x = random_like((2, 6, 8))
    for arguments in ({}, {"dim": 8, "value_dim": 4}):
        layer = VectorAttention(**arguments)
        model = functional_model(layer, x.shape)
        before = to_numpy(model(x))[0]
        denses = [
            d for d in layer._flatten_layers() if isinstance(d, keras.layers.Dense)
        ]
        assert len(denses) == 3 + bool(arguments)
        for dense in denses:
            dense.enable_lora(2)
            dense.lora_kernel_b.assign(0.3 * np.ones(dense.lora_kernel_b.shape))
        assert not np.allclose(to_numpy(model(x))[0], before)

        layer = VectorAttention(**arguments)
        model = functional_model(layer, x.shape)
        before = to_numpy(model(x))[0]
        model.quantize("int8")
        for dense in layer._flatten_layers():
            if isinstance(dense, keras.layers.Dense):
                assert dense.quantization_mode == "int8"
        assert_close(model(x), before, 0.05, "int8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, r"`dim` must be an integer of at least 1. Received: dim=0"),
        ({"value_dim": 1.5}, r"`value_dim` must be an integer.*value_dim=1.5"),
        ({"method": "fast"}, r"argument `method`. Expected one of .*method='fast'"),
        ({"scale": "x"}, r"`scale` must be a number or `None`. Received: scale='x'"),
        ({"dropout": 1.0}, r"`dropout` must be a number in \[0, 1\)"),
        ({"gamma": "dense"}, r"argument `gamma`. Expected one of"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        VectorAttention(**arguments)


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        (
            {},
            (2, 4, 4, 3),
            r"must have rank 3 .*Received: query of shape \(2, 4, 4, 3\)",
        ),
        ({"dim": 4, "value_dim": 3, "gamma": False}, (2, 4, 3), r"gamma=False, dim=4"),
        ({"gamma": True, "method": "interpolated"}, (2, 4, 3), r"cannot take the proj"),
        ({"dropout": 0.1, "method": "interpolated"}, (2, 4, 3), r"cannot take dropout"),
    ],
)
def test_bad_build(arguments, shape, message):
    with pytest.raises(ValueError, match=message):
        VectorAttention(**arguments).build(shape)


def test_scores_need_the_dense_method():
    with pytest.raises(ValueError, match=r"needs `method=\"dense\"`.*method='auto'"):
        VectorAttention()(random_like((1, 3, 2)), return_attention_scores=True)
