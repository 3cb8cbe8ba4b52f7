import keras
import numpy as np
import pytest

from tests.contract import (
    assert_close,
    random_like,
    randomize_weights,
    run_layer_contract,
)
from tokenlearner_keras.layers import MultiHeadSelfAttention


@pytest.mark.parametrize(
    ("arguments", "channels", "num_weights"),
    [
        ({"num_heads": 2, "key_dim": 3}, 8, 8 * (6 + 6 + 8)),
        ({"num_heads": 4, "key_dim": 3, "value_dim": 5}, 20, 8 * (12 + 12 + 20)),
    ],
)
def test_contract(arguments, channels, num_weights, tmp_path):
    def make_layer(**kwargs):
        return MultiHeadSelfAttention(**arguments, **kwargs)

    expected = (2, 6, channels)
    run_layer_contract(
        make_layer, (2, 6, 8), expected, tmp_path, num_weights=num_weights
    )


def test_weights_of_the_paper():
    layer = MultiHeadSelfAttention()
    layer.build((None, 64, 432))
    assert layer.count_params() == 297_216


def test_values():
    x = random_like((2, 6, 8))
    layer = MultiHeadSelfAttention(2, 3, use_bias=True)
    layer.build(x.shape)
    randomize_weights(layer)
    weights = [np.asarray(w, "float64") for w in layer.get_weights()]
    query, key, value = (
        (x @ kernel + bias).reshape(2, 6, 2, -1).transpose(0, 2, 1, 3)
        for kernel, bias in zip(weights[::2], weights[1::2], strict=True)
    )
    scores = np.exp(query @ key.swapaxes(-1, -2) / np.sqrt(3))
    scores /= scores.sum(-1, keepdims=True)
    expected = (scores @ value).transpose(0, 2, 1, 3).reshape(2, 6, 8)
    assert_close(layer(x), expected.astype("float32"))


def test_attention_scores():
    x = random_like((2, 6, 8))
    layer = MultiHeadSelfAttention(2, 3)
    outputs, scores = layer(x, return_attention_scores=True)
    assert_close(outputs, layer(x))
    scores = keras.ops.convert_to_numpy(scores)
    assert scores.shape == (2, 2, 6, 6)
    np.testing.assert_allclose(scores.sum(-1), 1, rtol=1e-5)
    symbolic = layer(keras.Input((6, 8)), return_attention_scores=True)
    assert [tuple(t.shape) for t in symbolic] == [(None, 6, 8), (None, 2, 6, 6)]


def test_bad_input():
    with pytest.raises(ValueError, match=r"`key_dim` must be.*key_dim=0"):
        MultiHeadSelfAttention(key_dim=0)
    with pytest.raises(ValueError, match=r"num_heads=8 for 12 channels"):
        MultiHeadSelfAttention()(random_like((1, 4, 12)))
    with pytest.raises(ValueError, match="must have rank 3"):
        MultiHeadSelfAttention()(random_like((1, 4, 4, 16)))
