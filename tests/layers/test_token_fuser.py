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
from tokenlearner_keras.layers import TokenFuser

CASES = [
    # tokens, inputs: an image, a flattened image, a video
    [(2, 4, 12), (2, 6, 5, 12)],
    [(2, 4, 12), (2, 30, 12)],
    [(2, 12, 12), (2, 3, 6, 5, 12)],
]


@pytest.mark.parametrize("mode", ["broadcast", "attention"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shapes", CASES)
def test_contract(mode, residual, shapes, tmp_path):
    run_layer_contract(
        lambda **kwargs: TokenFuser(mode, residual=residual, **kwargs),
        shapes,
        shapes[1],
        tmp_path,
    )


@pytest.mark.parametrize("mode", ["broadcast", "attention"])
def test_contract_with_every_argument_changed(mode, tmp_path):
    def make_layer(**kwargs):
        return TokenFuser(
            mode=mode,
            residual=False,
            bottleneck_dim=7,
            use_norm=False,
            use_bias=mode == "broadcast",
            dropout=0.3,
            kernel_initializer=keras.initializers.RandomNormal(seed=1),
            bias_initializer="ones",
            kernel_regularizer=keras.regularizers.L2(0.01),
            bias_regularizer="l1",
            **kwargs,
        )

    num_weights = {
        "broadcast": 12 * 3 + 3,
        "attention": 4 * 4 + 2 * 12 + 12 * 7 + 7 * 4,
    }[mode]
    run_layer_contract(
        make_layer, CASES[2], CASES[2][1], tmp_path, num_weights=num_weights
    )


def test_broadcast_equals_equation_3():
    """A loop over frames and tokens, as the paper writes it."""
    layer = TokenFuser()
    tokens, x = random_like((2, 12, 8)), random_like((2, 3, 6, 5, 8), 1)
    layer.build([tokens.shape, x.shape])
    randomize_weights(layer)
    kernel = to_numpy(layer.weights)[0]
    assert kernel.shape == (12, 3)
    expected = x.copy()
    for t in range(3):
        for i in range(12):
            expected[:, t] += kernel[i, t] * tokens[:, i, None, None]
    assert_close(layer([tokens, x]), expected, 1e-6)


def test_number_of_weights_of_the_paper():
    """Table 4: 8 tokens, 64 frames, shared by the channels, no biases."""
    layer = TokenFuser()
    layer.build([(None, 512, 432), (None, 64, 8, 8, 432)])
    assert layer.count_params() == 32_768


@pytest.mark.parametrize("shapes", CASES)
def test_a_zero_kernel_is_the_identity(shapes):
    layer = TokenFuser(kernel_initializer="zeros")
    tokens, x = (random_like(shape, seed) for seed, shape in enumerate(shapes))
    np.testing.assert_array_equal(to_numpy(layer([tokens, x]))[0], x)


@pytest.mark.parametrize("mode", ["broadcast", "attention"])
def test_the_residual_adds_the_inputs(mode):
    tokens, x = (random_like(shape, seed) for seed, shape in enumerate(CASES[2]))
    with_residual, without = TokenFuser(mode), TokenFuser(mode, residual=False)
    for layer in (with_residual, without):
        layer.build(CASES[2])
    randomize_weights(with_residual)
    without.set_weights(with_residual.get_weights())
    fused = to_numpy(without([tokens, x]))[0]
    assert_close(with_residual([tokens, x]), x + fused, 1e-6)


def test_attention_mode_equals_the_obvious_reference():
    layer = TokenFuser("attention", residual=False, bottleneck_dim=7)
    tokens, x = random_like((2, 4, 12)), random_like((2, 6, 5, 12), 1)
    layer.build([tokens.shape, x.shape])
    randomize_weights(layer)
    w = {
        v.path.split("/", 1)[1]: np.asarray(ops.convert_to_numpy(v), "float64")
        for v in layer.weights
    }

    def norm(y, name):
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        return y * w[f"{name}/gamma"] + w[f"{name}/beta"]

    def gelu(y):
        return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))

    mixed = norm(tokens.astype("float64"), "mix_norm_0")
    mixed = np.einsum("bic,ij->bjc", mixed, w["mix/kernel"])
    mixed = norm(mixed + w["mix/bias"][None, :, None], "mix_norm_1")
    hidden = gelu(norm(x, "inputs_norm") @ w["dense_0/kernel"] + w["dense_0/bias"])
    maps = 1 / (1 + np.exp(-(hidden @ w["dense_1/kernel"] + w["dense_1/bias"])))
    expected = sum(maps[..., s : s + 1] * mixed[:, s, None, None] for s in range(4))
    assert_close(layer([tokens, x]), expected.astype("float32"), 1e-5)


def test_attention_mode_treats_frames_alone():
    layer = TokenFuser("attention")
    tokens, x = (random_like(shape, seed) for seed, shape in enumerate(CASES[2]))
    layer.build(CASES[2])
    randomize_weights(layer)
    fused = to_numpy(layer([tokens, x]))[0]
    for t in range(3):
        frame = layer([tokens[:, 4 * t : 4 * t + 4], x[:, t]])
        assert_close(frame, fused[:, t], 1e-5)


def test_height_and_width_may_change():
    """Only the number of frames is fixed when the layer is built (section 3.2)."""
    for mode in ("broadcast", "attention"):
        layer = TokenFuser(mode)
        model = functional_model(layer, [(2, 12, 12), (2, 3, None, None, 12)])
        for height, width in ((6, 5), (4, 7)):
            inputs = [random_like((2, 12, 12)), random_like((2, 3, height, width, 12))]
            if keras.backend.backend() == "tensorflow":
                outputs = model.predict(inputs, verbose=0)
            else:
                outputs = model(inputs)
            assert_close(outputs, layer(inputs), 1e-6)


@pytest.mark.parametrize("mode", ["broadcast", "attention"])
def test_dropout_acts_in_training_only(mode):
    layer = TokenFuser(mode, dropout=0.5)
    inputs = [random_like(shape, seed) for seed, shape in enumerate(CASES[2])]
    layer.build(CASES[2])
    randomize_weights(layer)
    assert_close(layer(inputs, training=False), layer(inputs), 1e-6)
    first, second = (to_numpy(layer(inputs, training=True))[0] for _ in range(2))
    assert not np.allclose(first, second)


@pytest.mark.parametrize("mode", ["broadcast", "attention"])
def test_quantize_reaches_every_linear_map(mode):
    layer = TokenFuser(mode, name="layer")
    model = functional_model(layer, CASES[2])
    randomize_weights(layer)
    inputs = [random_like(shape, seed) for seed, shape in enumerate(CASES[2])]
    before = to_numpy(model(inputs))
    model.quantize("int8")
    kernels = [v for v in layer.variables if v.path.endswith("kernel")]
    assert len(kernels) == (1 if mode == "broadcast" else 3)
    assert all(kernel.dtype == "int8" for kernel in kernels)
    assert_close(model(inputs), before, 0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "mean"}, r"`mode`.*\('broadcast', 'attention'\).*mode='mean'"),
        ({"bottleneck_dim": 0}, r"`bottleneck_dim` must be .*bottleneck_dim=0"),
        ({"dropout": -0.1}, r"`dropout` must be .*dropout=-0.1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenFuser(**arguments)


@pytest.mark.parametrize("mode", ["broadcast", "attention"])
@pytest.mark.parametrize(
    ("tokens", "inputs", "message"),
    [
        ((2, 13, 12), (2, 3, 6, 5, 12), r"multiple of its number.*13 tokens for 3 "),
        ((2, 12, 8), (2, 3, 6, 5, 12), r"same channels.*\(2, 12, 8\).*\(2, 3, 6, 5"),
        ((2, 12), (2, 3, 6, 5, 12), r"tokens of rank 3.*\(2, 12\)"),
        ((2, 12, 12), (2, 12), r"rank 3, 4 or 5.*inputs of shape \(2, 12\)"),
        ((2, None, 12), (2, 3, 6, 5, 12), r"known number of tokens and frames"),
        ((2, 12, 12), (2, None, 6, 5, 12), r"known number of tokens and frames"),
        ((2, 12, None), (2, 3, 6, 5, None), r"channels.*must be known"),
    ],
)
def test_bad_inputs(mode, tokens, inputs, message):
    with pytest.raises(ValueError, match=message):
        TokenFuser(mode)([keras.KerasTensor(tokens), keras.KerasTensor(inputs)])


def test_one_tensor_instead_of_two():
    with pytest.raises(ValueError, match=r"list of two tensors, \[tokens, inputs\]"):
        TokenFuser()(keras.KerasTensor((2, 12, 12)))


def test_another_number_of_tokens_than_it_was_built_for():
    """A clip of another length, or another TokenLearner, is refused by name."""
    layer = TokenFuser(name="fuser")
    layer.build([(2, 12, 8), (2, 3, 6, 5, 8)])
    with pytest.raises(
        ValueError, match=r"'fuser' was built for 12 tokens and 3 frame.*16 .* and 4"
    ):
        layer([random_like((2, 16, 8)), random_like((2, 4, 6, 5, 8))])
