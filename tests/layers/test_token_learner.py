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
    to_numpy,
)
from tokenlearner_keras.layers import TokenLearner, token_learner

VARIANTS = ["v1", "video", "v10", "v11"]


def make(variant, num_tokens=4, shape=(2, 6, 5, 12), seed=0, **arguments):
    """A built layer of a variant with random weights."""
    layer = getattr(TokenLearner, variant)(num_tokens, **arguments)
    layer.build(shape)
    randomize_weights(layer, seed)
    return layer


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def conv2d(x, kernel, bias):
    """A `same` convolution of odd size, tap by tap, in float64."""
    size = kernel.shape[0]
    padded = np.pad(x, [(0, 0), *[(size // 2, size // 2)] * 2, (0, 0)])
    height, width = x.shape[1:3]
    out = sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j]
        for i in range(size)
        for j in range(size)
    )
    return out + bias


def reference(layer, x):
    """Equation 1, map by map, in float64: the tokens and the maps."""
    x = np.asarray(x, "float64")
    weights = {
        v.path.split("/", 1)[1]: np.asarray(ops.convert_to_numpy(v), "float64")
        for v in layer.weights
    }
    hidden = x
    if layer.use_norm:
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        hidden = (x - mean) / np.sqrt(var + 1e-6)
        hidden = hidden * weights["norm/gamma"] + weights["norm/beta"]
    count = layer.num_convs if layer.attention == "conv" else 2
    for index in range(count):
        name = f"{'conv' if layer.attention == 'conv' else 'dense'}_{index}"
        if index:
            hidden = gelu(hidden)
        kernel, bias = weights[f"{name}/kernel"], weights.get(f"{name}/bias", 0.0)
        if layer.attention == "conv":
            hidden = conv2d(hidden, kernel, bias)
        else:
            hidden = hidden @ kernel + bias
    if layer.activation == "sigmoid":
        maps = 1 / (1 + np.exp(-hidden))
    else:
        maps = np.exp(hidden - hidden.max((1, 2), keepdims=True))
        maps = maps / maps.sum((1, 2), keepdims=True)
    values = x @ weights["value/kernel"] if layer.value_dim else x
    pool = np.mean if layer.pooling == "mean" else np.sum
    tokens = [
        pool(maps[..., s : s + 1] * values, axis=(1, 2))
        for s in range(layer.num_tokens)
    ]
    return np.stack(tokens, 1), np.moveaxis(maps, -1, 1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("shape", "expected", "arguments"),
    [
        ((2, 6, 5, 12), (2, 4, 12), {}),
        ((2, 30, 12), (2, 4, 12), {"grid_shape": (6, 5)}),
        ((2, 3, 6, 5, 12), (2, 12, 12), {}),
    ],
)
def test_contract(variant, shape, expected, arguments, tmp_path):
    def make_layer(**kwargs):
        return getattr(TokenLearner, variant)(4, **arguments, **kwargs)

    run_layer_contract(make_layer, shape, expected, tmp_path)


def test_contract_with_attention_maps(tmp_path):
    run_layer_contract(
        lambda **kwargs: TokenLearner.v11(3, **kwargs),
        (2, 4, 6, 5, 12),
        [(2, 12, 12), (2, 4, 3, 6, 5)],
        tmp_path,
        return_attention_maps=True,
    )


def test_contract_with_every_argument_changed(tmp_path):
    def make_layer(**kwargs):
        return TokenLearner(
            num_tokens=3,
            attention="conv",
            num_convs=2,
            kernel_size=5,
            bottleneck_dim=7,
            activation="softmax",
            pooling="sum",
            use_norm=True,
            use_bias=True,
            value_dim=6,
            dropout=0.2,
            grid_shape=(5, 6),
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.1, seed=1),
            bias_initializer="ones",
            kernel_regularizer=keras.regularizers.L2(0.01),
            bias_regularizer="l1",
            **kwargs,
        )

    run_layer_contract(
        make_layer,
        (2, 30, 12),
        (2, 3, 6),
        tmp_path,
        num_weights=24 + (25 * 12 * 3 + 3) + (25 * 3 * 3 + 3) + 12 * 6,
        # A softmax ignores what a bias adds to all positions.
        zero_gradients=("conv_1/bias",),
    )
    layer = make_layer()
    layer.build((2, 30, 12))
    first, second = (c.kernel for c in layer.attention_layers)
    assert len(layer.losses) == 5  # two kernels, two biases, the value map
    assert (
        not np.allclose(
            to_numpy(first)[0].ravel()[:10], to_numpy(second)[0].ravel()[:10]
        )
        or first.shape != second.shape
    )


@pytest.mark.parametrize(
    ("variant", "num_weights"),
    [
        # The difference that Table 1's models show: 384 channels, 8 tokens.
        ("v1", 9 * 384 * 8 + 2 * 9 * 8 * 8),
        ("video", 9 * 384 * 8),
        ("v10", 2 * 384 + 9 * 384 * 8 + 3 * 9 * 8 * 8),
        ("v11", 2 * 384 + 384 * 64 + 64 + 64 * 8 + 8),
    ],
)
def test_number_of_weights(variant, num_weights):
    layer = getattr(TokenLearner, variant)(8)
    layer.build((None, 14, 14, 384))
    assert layer.count_params() == num_weights


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value_dim", [None, 7])
def test_equals_the_obvious_reference(variant, value_dim):
    layer = make(variant, value_dim=value_dim)
    x = random_like((2, 6, 5, 12))
    tokens, maps = layer(x, return_attention_maps=True)
    expected_tokens, expected_maps = reference(layer, x)
    assert_close(tokens, expected_tokens.astype("float32"), 1e-5)
    assert_close(maps, expected_maps.astype("float32"), 1e-5)


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_a_constant_attention_map_gives_the_mean(pooling):
    layer = TokenLearner(3, pooling=pooling)
    layer.build((2, 6, 5, 12))
    layer.set_weights([np.zeros(w.shape) for w in layer.weights])
    x = random_like((2, 6, 5, 12))
    mean = x.mean((1, 2)) * 0.5 * (1 if pooling == "mean" else 30)
    assert_close(layer(x), np.repeat(mean[:, None], 3, 1), 1e-6)


def test_softmax_maps_sum_to_one_over_the_positions():
    layer = make("v11")
    x = random_like((2, 3, 6, 5, 12))
    _, maps = layer(x, return_attention_maps=True)
    np.testing.assert_allclose(to_numpy(maps)[0].sum((-2, -1)), 1.0, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_permute_with_the_last_kernel(variant):
    layer = make(variant)
    x = random_like((2, 6, 5, 12))
    before = to_numpy(layer(x))[0]
    order = [2, 0, 3, 1]
    last = layer.attention_layers[-1]
    last.set_weights([w[..., order] for w in last.get_weights()])
    assert_close(layer(x), before[:, order], 1e-6)


def test_mean_and_sum_pooling_differ_by_the_number_of_positions():
    mean, total = make("v1", pooling="mean"), make("v1", pooling="sum")
    total.set_weights(mean.get_weights())
    x = random_like((2, 8, 4, 12))  # 32 positions: the division is exact
    np.testing.assert_array_equal(to_numpy(mean(x))[0] * 32, to_numpy(total(x))[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_video_equals_its_frames_one_by_one(variant):
    layer = make(variant)
    x = random_like((2, 3, 6, 5, 12))
    tokens, maps = layer(x, return_attention_maps=True)
    frames = [layer(x[:, t], return_attention_maps=True) for t in range(3)]
    assert_close(tokens, np.concatenate([to_numpy(f[0])[0] for f in frames], 1), 1e-6)
    assert_close(maps, np.stack([to_numpy(f[1])[0] for f in frames], 1), 1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_flattened_input_equals_the_grid(variant):
    layer = make(variant)
    flat = make(variant, grid_shape=(6, 5))
    flat.set_weights(layer.get_weights())
    x = random_like((2, 6, 5, 12))
    assert_close(
        flat(x.reshape(2, 30, 12), return_attention_maps=True),
        layer(x, return_attention_maps=True),
        1e-6,
    )


def test_a_square_grid_needs_no_grid_shape():
    layer = make("v1", shape=(2, 25, 12))
    x = random_like((2, 25, 12))
    assert_close(layer(x), layer(x.reshape(2, 5, 5, 12)), 1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unknown_height_width_and_time(variant):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow has dimensions that are unknown at run time")
    layer = make(variant)
    images = functional_model(layer, (2, None, None, 12))
    videos = functional_model(layer, (2, None, None, None, 12))
    assert images.output_shape == (None, 4, 12)
    assert videos.output_shape == (None, None, 12)
    for height, width in ((6, 5), (3, 8)):
        x = random_like((2, 3, height, width, 12))
        assert_close(images(x[:, 0]), layer(x[:, 0]), 1e-6)
        assert_close(videos.predict(x, verbose=0), layer(x), 1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_positions_are_as_if_absent(variant):
    """A padded image with a mask gives the tokens of the image without padding."""
    layer = make(variant)
    x = random_like((2, 6, 5, 12))
    padded = np.concatenate([x, 100 * random_like((2, 6, 3, 12), 1)], axis=2)
    mask = np.zeros((2, 6, 8), bool)
    mask[:, :, :5] = True
    tokens, maps = layer(padded, mask=mask, return_attention_maps=True)
    expected, expected_maps = layer(x, return_attention_maps=True)
    assert_close(tokens, expected, 1e-5)
    assert_close(maps[..., :5], expected_maps, 1e-5)
    assert np.all(to_numpy(maps)[0][..., 5:] == 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_frame_that_is_masked_whole_gives_zero_tokens(variant):
    layer = make(variant)
    mask = np.ones((2, 6, 5), bool)
    mask[1] = False
    tokens = to_numpy(layer(random_like((2, 6, 5, 12)), mask=mask))[0]
    assert np.all(tokens[1] == 0)
    assert np.all(np.isfinite(tokens[0]))
    assert np.any(tokens[0] != 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_acts_in_training_only(variant):
    layer = make(variant, dropout=0.5)
    plain = make(variant)
    x = random_like((2, 6, 5, 12))
    assert_close(layer(x, training=False), plain(x), 1e-6)
    first, second = (to_numpy(layer(x, training=True))[0] for _ in range(2))
    assert not np.allclose(first, second)


def test_the_pooled_features_are_not_normalised():
    layer = make("v11")
    x = random_like((2, 6, 5, 12))
    tokens = to_numpy(layer(x))[0]
    # The attention sees the normalised input, which a factor does not change.
    assert_close(layer(1000 * x), 1000 * tokens, 1e-3)


def test_variants_take_other_arguments():
    layer = TokenLearner.video(16, kernel_size=1, value_dim=432, name="first")
    assert (layer.num_tokens, layer.num_convs, layer.kernel_size) == (16, 1, 1)
    assert (layer.value_dim, layer.name) == (432, "first")
    assert TokenLearner.v10(pooling="mean").pooling == "mean"


def test_quantize_and_lora_reach_the_mlp():
    layer = TokenLearner.v11(4, name="layer")
    model = functional_model(layer, (2, 6, 5, 12))
    x = random_like((2, 6, 5, 12))
    before = to_numpy(model(x))
    for dense in layer.attention_layers:
        dense.enable_lora(2)
    assert_close(model(x), before, 1e-6)
    assert len(layer.trainable_weights) == 2 + 2 * 3  # norm; a, b and bias twice
    model.quantize("int8")
    assert all(d.quantization_mode == "int8" for d in layer.attention_layers)
    assert_close(model(x), before, 0.05)


@pytest.mark.tensorflow
@pytest.mark.parametrize("variant", VARIANTS)
def test_weighted_copies_of_the_input_are_never_stored(variant):
    """No array of S·H·W·C elements in the compiled forward or backward pass."""
    import tensorflow as tf

    from tests.hlo import constant, forward_and_backward, largest_buffer

    num_tokens, shape = 8, (1, 14, 14, 96)
    limit = num_tokens * 14 * 14 * 96
    x = constant(shape)
    layer = getattr(TokenLearner, variant)(num_tokens)
    assert largest_buffer(layer, x) < limit
    assert largest_buffer(forward_and_backward(layer, x), x) < limit

    # The measure sees such an array where there is one.
    def stored(x):
        maps = tf.sigmoid(x[..., :num_tokens])
        product = maps[..., None] * x[..., None, :]
        return product, tf.reduce_mean(product, (1, 2))

    assert largest_buffer(stored, x) >= limit


@pytest.mark.parametrize(
    ("variant", "shape", "arguments"),
    [
        ("v1", (2, 6, 5, 24), {}),
        ("v1", (2, 6, 5, 24), {"kernel_size": 2, "use_bias": True}),
        ("v10", (2, 5, 6, 52), {"kernel_size": 5}),
        ("video", (2, 3, 4, 3, 20), {"kernel_size": 1}),
    ],
)
@pytest.mark.parametrize("where", ["compiled_for_cpu", "on_gpu"])
def test_taps_equal_the_convolution(variant, shape, arguments, where, monkeypatch):
    layer = make(variant, 2, shape, **arguments)
    model = functional_model(layer, shape)
    x = random_like(shape)
    mask = random_like(shape[:-1], 1) > -0.5
    expected = [model(x), layer(x, mask=mask), *gradients(model, x).values()]
    assert shape[-1] in seen_channels(layer, monkeypatch, model, x)

    monkeypatch.setattr(token_learner, where, lambda: True)
    assert shape[-1] not in seen_channels(layer, monkeypatch, model, x)
    actual = [model(x), layer(x, mask=mask), *gradients(model, x).values()]
    assert_close(actual, expected, 5e-6)


def test_taps_in_half_precision_are_as_exact_as_the_convolution(monkeypatch):
    shape = (2, 6, 5, 24)
    layers = [make("v1", 2, shape, dtype=d) for d in ("float32", "mixed_bfloat16")]
    layers[1].set_weights(layers[0].get_weights())
    exact, model = (functional_model(layer, shape) for layer in layers)
    x = random_like(shape)

    def results(model):
        arrays = [model(x), *gradients(model, x).values()]
        return [ops.convert_to_numpy(ops.cast(a, "float32")) for a in arrays]

    def errors():
        pairs = zip(results(model), results(exact), strict=True)
        return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]

    by_convolution = errors()
    monkeypatch.setattr(token_learner, "on_gpu", lambda: True)
    by_taps = errors()
    # The taps of the first convolution are rounded before they are summed.
    assert by_taps != by_convolution
    assert np.all(np.array(by_taps) < 2 * np.array(by_convolution))


def seen_channels(layer, monkeypatch, model, x):
    """Channels of what the layer's own convolutions are called with."""
    seen = []
    with monkeypatch.context() as patch:
        for convolution in layer.attention_layers:
            call = convolution.call
            patch.setattr(
                convolution,
                "call",
                lambda x, call=call: seen.append(x.shape[-1]) or call(x),
            )
        model(x)
    return seen


@pytest.mark.tensorflow
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_for_cpu_equals_eager(variant, dtype):
    import tensorflow as tf

    from tests.hlo import constant, forward_and_backward

    layer = make(variant, 2, (2, 6, 5, 24), dtype=dtype)
    x = constant((2, 6, 5, 24))
    function = forward_and_backward(layer, x)
    compiled = tf.function(function, jit_compile=True)
    rtol = 1e-5 if dtype == "float32" else 5e-2
    names = ["tokens", "inputs", *(v.path for v in layer.trainable_variables)]
    for name, actual, expected in zip(
        names,
        tf.nest.flatten(compiled(x)),
        tf.nest.flatten(function(x)),
        strict=True,
    ):
        if not name.endswith("dense_1/bias"):  # Zero: a softmax ignores it.
            assert_close(actual, expected, rtol, name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 0}, r"`num_tokens` must be an integer.*num_tokens=0"),
        ({"num_tokens": -1}, r"`num_tokens` must be an integer.*num_tokens=-1"),
        ({"num_tokens": 2.5}, r"`num_tokens` must be an integer.*num_tokens=2.5"),
        ({"attention": "cnn"}, r"`attention`.*\('conv', 'mlp'\).*attention='cnn'"),
        ({"num_convs": 0}, r"`num_convs` must be .*num_convs=0"),
        ({"kernel_size": 0}, r"`kernel_size` must be .*kernel_size=0"),
        ({"bottleneck_dim": 0}, r"`bottleneck_dim` must be .*bottleneck_dim=0"),
        ({"activation": "relu"}, r"`activation`.*activation='relu'"),
        ({"pooling": "max"}, r"`pooling`.*pooling='max'"),
        ({"value_dim": 0}, r"`value_dim` must be .*value_dim=0"),
        ({"dropout": 1.0}, r"`dropout` must be a number in \[0, 1\).*dropout=1.0"),
        ({"grid_shape": 4}, r"`grid_shape` must be a pair.*grid_shape=4"),
        ({"grid_shape": (4, 0)}, r"`grid_shape\[1\]` must be .*=0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenLearner(**arguments)


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        ({}, (2, 12), r"rank 4 .*rank 3 .*rank 5.*input_shape=\(2, 12\)"),
        ({}, (2, 30, 12), r"30 positions.*not a square grid.*grid_shape"),
        ({"attention": "mlp"}, (2, 30, 12), r"30 positions.*not a square grid"),
        (
            {"grid_shape": (6, 6)},
            (2, 30, 12),
            r"grid_shape=\(6, 6\) \(36 positions\).*30",
        ),
        ({"grid_shape": (6, 6)}, (2, 6, 5, 12), r"grid_shape=\(6, 6\).*\(2, 6, 5, 12"),
        ({}, (2, None, 12), r"unknown length.*grid_shape"),
        ({}, (2, 6, 5, None), r"channels.*must be known.*\(2, 6, 5, None\)"),
        ({"num_tokens": 31}, (2, 6, 5, 12), r"num_tokens=31 for 6 x 5 = 30 positions"),
    ],
)
def test_bad_inputs(arguments, shape, message):
    layer = TokenLearner(**{"num_tokens": 4, **arguments})
    with pytest.raises(ValueError, match=message):
        layer(keras.KerasTensor(shape))
