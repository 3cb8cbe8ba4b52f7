import keras
import numpy as np
import pytest

from tests.contract import (
    assert_close,
    random_like,
    randomize_weights,
    run_layer_contract,
    to_numpy,
)
from tokenlearner_keras.layers import VectorTransformerBlock
from tokenlearner_keras.layers.activations import gelu


@pytest.mark.parametrize(
    "arguments", [{}, {"output_projection": True, "use_bias": True, "dropout": 0.1}]
)
def test_contract(arguments, tmp_path):
    run_layer_contract(
        lambda **kwargs: VectorTransformerBlock(12, **arguments, **kwargs),
        (2, 5, 8),
        (2, 5, 8),
        tmp_path,
        zero_gradients=("key/bias",),
    )


def test_is_pre_norm_attention_then_mlp():
    x = random_like((2, 6, 8))
    block = VectorTransformerBlock(12)
    block.build(x.shape)
    randomize_weights(block)
    y = x + to_numpy(block.attention(block.attention_norm(x)))[0]
    hidden, output = block.mlp_layers
    expected = y + to_numpy(output(gelu(hidden(block.mlp_norm(y)))))[0]
    assert_close(block(x), expected, 1e-5)


def test_stochastic_depth_drops_whole_branches():
    x = random_like((64, 4, 8))
    block = VectorTransformerBlock(12, stochastic_depth=0.5, seed=0)
    outputs = to_numpy(block(x, training=True))[0]
    unchanged = np.all(outputs == x, axis=(1, 2)).mean()
    assert 0.05 < unchanged < 0.5  # both branches dropped: a quarter
    assert not np.any(np.all(to_numpy(block(x))[0] == x, axis=(1, 2)))


def test_masked_tokens_do_not_reach_the_others():
    x = random_like((1, 6, 8))
    mask = np.array([[True] * 4 + [False] * 2])
    block = VectorTransformerBlock(12)
    first = to_numpy(block(x, mask=mask))[0]
    x[:, 4:] = 100
    second = to_numpy(block(x, mask=mask))[0]
    np.testing.assert_allclose(first[:, :4], second[:, :4], rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mlp_dim": 0}, r"`mlp_dim` must be an integer of at least 1"),
        ({"mlp_dim": 4, "dropout": 2}, r"`dropout` must be a number in \[0, 1\)"),
        ({"mlp_dim": 4, "attention_dropout": -1}, r"`attention_dropout` must be"),
        ({"mlp_dim": 4, "stochastic_depth": 1}, r"`stochastic_depth` must be"),
        ({"mlp_dim": 4, "method": "x"}, r"argument `method`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        VectorTransformerBlock(**arguments)


def test_bad_rank():
    with pytest.raises(ValueError, match=r"must have rank 3 .*input_shape=\(2, 3\)"):
        VectorTransformerBlock(4).build((2, 3))


# One example with 4096 tokens of 432 channels; the pair tensor would take 29 GB.
TRAIN = """
import resource
import keras
import numpy as np
from tokenlearner_keras.layers import VectorTransformerBlock
inputs = keras.Input((4096, 432))
model = keras.Model(inputs, VectorTransformerBlock(432)(inputs))
model.compile("sgd", "mse", jit_compile=True)
x = np.random.default_rng(0).standard_normal((1, 4096, 432)).astype("float32")
losses = [float(model.train_on_batch(x, 0 * x)) for _ in range(3)]
assert losses[2] < losses[0], losses
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_4096_tokens_train_within_4_gib():
    import subprocess
    import sys

    if keras.backend.backend() != "tensorflow":
        pytest.skip("the figure is for the default backend")
    result = subprocess.run(
        [sys.executable, "-c", TRAIN], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    peak = float(result.stdout.split("PEAK")[1])
    assert peak < 4, f"{peak:.2f} GiB"
