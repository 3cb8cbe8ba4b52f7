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
from tokenlearner_keras.layers import TransformerBlock


def num_weights(channels, mlp_dim):
    attention = 4 * (channels * channels + channels)
    mlp = channels * mlp_dim + mlp_dim + mlp_dim * channels + channels
    return attention + mlp + 4 * channels


def test_contract(tmp_path):
    run_layer_contract(
        lambda **kwargs: TransformerBlock(
            4,
            24,
            dropout=0.1,
            attention_dropout=0.2,
            stochastic_depth=0.3,
            kernel_regularizer="l2",
            seed=7,
            **kwargs,
        ),
        (2, 7, 16),
        (2, 7, 16),
        tmp_path,
        num_weights=num_weights(16, 24),
        zero_gradients=("key/bias",),
    )


def test_contract_with_scores(tmp_path):
    run_layer_contract(
        lambda **kwargs: TransformerBlock(2, 8, **kwargs),
        (2, 5, 8),
        [(2, 5, 8), (2, 2, 5, 5)],
        tmp_path,
        zero_gradients=("key/bias",),
        return_attention_scores=True,
    )


def reference(block, x):
    """The block by its equations, in float64."""
    weights = {
        "/".join(v.path.split("/")[-2:]): np.asarray(
            ops.convert_to_numpy(v.value), "float64"
        )
        for v in block.weights
        if "seed" not in v.path
    }

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * weights[f"{name}/gamma"] + weights[f"{name}/beta"]

    def project(x, name):
        y = np.einsum("bnd,dhk->bnhk", x, weights[f"{name}/kernel"])
        return y + weights[f"{name}/bias"]

    y = norm(x, "attention_norm")
    q, k, v = (project(y, name) for name in ("query", "key", "value"))
    logits = np.einsum("bihk,bjhk->bhij", q, k) / np.sqrt(q.shape[-1])
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    y = np.einsum("bhij,bjhk->bihk", scores, v)
    y = np.einsum("bihk,hkd->bid", y, weights["attention_output/kernel"])
    x = x + y + weights["attention_output/bias"]
    y = norm(x, "mlp_norm") @ weights["mlp_0/kernel"] + weights["mlp_0/bias"]
    y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    return x + y @ weights["mlp_1/kernel"] + weights["mlp_1/bias"], scores


def test_equals_the_equations():
    block = TransformerBlock(3, 20)
    x = random_like((2, 6, 12))
    block(x)
    randomize_weights(block)
    outputs, scores = block(x, return_attention_scores=True)
    expected = reference(block, x.astype("float64"))
    assert_close([outputs, scores], [e.astype("float32") for e in expected], 1e-5)
    assert_close(block(x), expected[0].astype("float32"), 1e-5)


def test_tokens_permute():
    block = TransformerBlock(2, 16)
    x = random_like((2, 6, 8))
    outputs = ops.convert_to_numpy(block(x))
    order = np.random.default_rng(1).permutation(6)
    assert_close(block(x[:, order]), outputs[:, order])


def test_masked_tokens_do_not_count():
    block = TransformerBlock(2, 16)
    x = random_like((2, 6, 8))
    mask = np.array([[True] * 4 + [False] * 2] * 2)
    short = block(x[:, :4])
    x[:, 4:] = 1e3
    assert_close(block(x, mask=mask)[:, :4], short)


def test_attention_kernels_start_at_the_scale_of_their_matrix():
    channels = 64
    block = TransformerBlock(4, 8)
    block.build((None, 5, channels))
    kernels = [
        ops.convert_to_numpy(v.value) for v in block.attention.weights if v.ndim == 3
    ]
    assert len(kernels) == 4
    for kernel in kernels:
        # Glorot, uniform in +-sqrt(6 / (2 d)).
        assert kernel.std() == pytest.approx(1 / np.sqrt(channels), rel=0.05)
    assert np.any(kernels[0] != kernels[1])


def test_stochastic_depth_and_dropout_act_in_training_only():
    x = random_like((64, 3, 8))
    for arguments in (
        {"stochastic_depth": 0.5},
        {"dropout": 0.5},
        {"attention_dropout": 0.5},
    ):
        block = TransformerBlock(2, 16, seed=1, **arguments)
        outputs = ops.convert_to_numpy(block(x, training=True))
        inference = ops.convert_to_numpy(block(x))
        assert_close(block(x), inference)
        changed = np.abs(outputs - inference).max(axis=(1, 2)) > 1e-5
        assert changed.any()
    block = TransformerBlock(2, 16, stochastic_depth=0.5, seed=1)
    outputs = ops.convert_to_numpy(block(x, training=True))
    # Both branches of about a quarter of the examples are dropped.
    same = np.abs(outputs - x).max(axis=(1, 2)) == 0
    assert 4 <= same.sum() <= 30


@pytest.mark.tensorflow
def test_quantization_and_lora_reach_all_projections():
    inputs = keras.Input((5, 16))
    model = keras.Model(inputs, TransformerBlock(2, 32, name="block")(inputs))
    x = random_like((4, 5, 16))
    expected = model(x)
    block = model.get_layer("block")
    projections = [
        layer
        for layer in block._flatten_layers()
        if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense))
    ]
    assert len(projections) == 6
    for layer in projections:
        layer.enable_lora(2)
    assert_close(model(x), expected)
    assert sum("lora" in v.path for v in model.trainable_weights) == 12

    model = keras.Model(inputs, TransformerBlock(2, 32)(inputs))
    expected = model(x)
    model.quantize("int8")
    assert sum(v.dtype == "int8" for v in model.weights) == 6
    assert_close(model(x), expected, 0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"num_heads": 0, "mlp_dim": 4},
            "`num_heads` must be an integer of at least 1",
        ),
        (
            {"num_heads": 2, "mlp_dim": 2.5},
            "`mlp_dim` must be an integer of at least 1",
        ),
        ({"num_heads": 2, "mlp_dim": 4, "dropout": 1.0}, "`dropout` must be a number"),
        (
            {"num_heads": 2, "mlp_dim": 4, "attention_dropout": -1},
            "`attention_dropout` must be a number",
        ),
        (
            {"num_heads": 2, "mlp_dim": 4, "stochastic_depth": 2},
            "`stochastic_depth` must be a number",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TransformerBlock(**arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 4, 8), "must have rank 3"),
        ((2, 4, None), r"\(channels\) .* must be known"),
        ((2, 4, 9), "`num_heads` .* must divide .* num_heads=2 for 9 channels"),
    ],
)
def test_bad_input(shape, message):
    with pytest.raises(ValueError, match=message):
        TransformerBlock(2, 4)(keras.Input(batch_shape=shape))
