import keras
import numpy as np
import pytest

from tests.contract import (
    assert_close,
    random_like,
    randomize_weights,
    run_layer_contract,
)
from tokenlearner_keras.layers import DenseTokenizer


@pytest.mark.parametrize(
    ("shape", "expected", "arguments", "num_weights"),
    [
        ((2, 6, 5, 12), (2, 4, 12), {}, 120),
        ((2, 30, 12), (2, 4, 12), {"grid_shape": (6, 5), "use_bias": True}, 124),
        ((2, 3, 3, 4, 5), (2, 12, 5), {"over": "frame"}, 60 * 20),
    ],
)
def test_contract(shape, expected, arguments, num_weights, tmp_path):
    def make_layer(**kwargs):
        return DenseTokenizer(4, **arguments, **kwargs)

    run_layer_contract(make_layer, shape, expected, tmp_path, num_weights=num_weights)


def test_constant_kernel_gives_the_mean():
    x = random_like((2, 3, 4, 4, 5))
    layer = DenseTokenizer(2, kernel_initializer=keras.initializers.Constant(1 / 16))
    mean = x.mean(axis=(2, 3))
    assert_close(layer(x), np.repeat(mean, 2, axis=1))


def test_values_over_positions_and_frame():
    x = random_like((2, 3, 4, 5))
    layer = DenseTokenizer(6)
    layer.build(x.shape)
    randomize_weights(layer)
    kernel = np.asarray(keras.ops.convert_to_numpy(layer.dense.kernel))
    expected = np.einsum("bpc,ps->bsc", x.reshape(2, 12, 5), kernel)
    assert_close(layer(x), expected)

    layer = DenseTokenizer(6, over="frame")
    layer.build(x.shape)
    randomize_weights(layer)
    kernel = np.asarray(keras.ops.convert_to_numpy(layer.dense.kernel))
    assert_close(layer(x), (x.reshape(2, 60) @ kernel).reshape(2, 6, 5))


def test_bad_input():
    with pytest.raises(ValueError, match=r"argument `over`.*over='pixels'"):
        DenseTokenizer(8, over="pixels")
    with pytest.raises(ValueError, match="needs a known height and width"):
        DenseTokenizer(8)(keras.Input((None, 4, 3)))
    with pytest.raises(ValueError, match=r"num_tokens=8 for 2 x 2 = 4 positions"):
        DenseTokenizer(8)(random_like((1, 2, 2, 3)))
    layer = DenseTokenizer(2)
    layer(random_like((1, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"built for 16 positions.*5 x 4 = 20"):
        layer(keras.Input((5, 4, 3)))
