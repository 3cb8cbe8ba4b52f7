import keras
import numpy as np
import pytest

from tests.contract import assert_close, random_like, run_layer_contract
from tokenlearner_keras.layers import PoolingTokenizer


@pytest.mark.parametrize(
    ("shape", "expected", "arguments", "num_weights"),
    [
        ((2, 6, 5, 12), (2, 4, 12), {}, 12 * 12 * 5),
        ((2, 30, 12), (2, 4, 12), {"grid_shape": (6, 5), "hidden_dim": 7}, 12 * 7 * 5),
        ((2, 3, 3, 4, 5), (2, 12, 5), {"use_bias": True}, 25 * 5 + 5 + 20),
    ],
)
def test_contract(shape, expected, arguments, num_weights, tmp_path):
    def make_layer(**kwargs):
        return PoolingTokenizer(4, **arguments, **kwargs)

    run_layer_contract(make_layer, shape, expected, tmp_path, num_weights=num_weights)


def test_tokens_depend_on_the_frame_mean_only():
    x = random_like((2, 3, 4, 4, 5))
    layer = PoolingTokenizer(3)
    shuffled = np.random.default_rng(1).permutation(x.reshape(2, 3, 16, 5), axis=2)
    expected = layer(x)
    assert_close(layer(shuffled.reshape(x.shape)), expected)
    mean = np.broadcast_to(x.mean(axis=(2, 3), keepdims=True), x.shape)
    assert_close(layer(np.ascontiguousarray(mean)), expected)


def test_video_equals_frame_by_frame():
    x = random_like((2, 3, 6, 4, 5))
    layer = PoolingTokenizer(4)
    frames = [keras.ops.convert_to_numpy(layer(x[:, t])) for t in range(3)]
    assert_close(layer(x), np.stack(frames, axis=1).reshape(2, 12, 5))


def test_dropout_acts_in_training_only():
    x = random_like((2, 4, 4, 5))
    layer = PoolingTokenizer(4, dropout=0.5)
    assert_close(layer(x, training=False), layer(x, training=False))
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(layer(x, training=True), layer(x, training=False))


def test_bad_input():
    with pytest.raises(ValueError, match=r"`hidden_dim` must be.*hidden_dim=-1"):
        PoolingTokenizer(8, hidden_dim=-1)
    with pytest.raises(ValueError, match=r"`dropout` must be.*dropout=1"):
        PoolingTokenizer(8, dropout=1)
    with pytest.raises(ValueError, match="not a square grid"):
        PoolingTokenizer(8)(random_like((1, 12, 2)))
