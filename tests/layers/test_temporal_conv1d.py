import keras
import numpy as np
import pytest

from tests.contract import (
    assert_close,
    random_like,
    randomize_weights,
    run_layer_contract,
)
from tokenlearner_keras.layers import TemporalConv1D
from tokenlearner_keras.layers._forms import literal_definitions


@pytest.mark.parametrize(
    ("arguments", "expected", "num_weights"),
    [
        ({"filters": 6}, (2, 3, 5, 4, 6), 3 * 4 * 6),
        ({"kernel_size": 5, "depthwise": True}, (2, 3, 5, 4, 4), 5 * 4),
        ({"use_bias": True}, (2, 3, 5, 4, 4), 3 * 16 + 4),
    ],
)
def test_contract(arguments, expected, num_weights, tmp_path):
    def make_layer(**kwargs):
        return TemporalConv1D(**arguments, **kwargs)

    shape = (2, 3, 5, 4, 4)
    run_layer_contract(make_layer, shape, expected, tmp_path, num_weights=num_weights)


def test_equals_a_1d_convolution_at_every_pixel():
    x = random_like((2, 6, 3, 2, 4))
    layer = TemporalConv1D(7)
    layer.build(x.shape)
    randomize_weights(layer)
    twin = keras.layers.Conv1D(7, 3, padding="same", use_bias=False)
    twin.build((None, None, 4))
    twin.set_weights([np.asarray(layer.get_weights()[0])[:, 0]])
    pixels = np.ascontiguousarray(x.transpose(0, 2, 3, 1, 4).reshape(-1, 6, 4))
    expected = keras.ops.convert_to_numpy(twin(pixels))
    expected = expected.reshape(2, 3, 2, 6, 7).transpose(0, 3, 1, 2, 4)
    assert_close(layer(x), expected)


def test_unknown_sizes():
    inputs = keras.Input((None, None, None, 4))
    layer = TemporalConv1D(7)
    outputs = layer(inputs)
    assert tuple(outputs.shape) == (None, None, None, None, 7)
    x = random_like((2, 3, 5, 4, 4))
    assert_close(keras.Model(inputs, outputs)(x), layer(x))


def test_bad_input():
    with pytest.raises(ValueError, match=r"`filters` must be.*filters=1.5"):
        TemporalConv1D(1.5)
    with pytest.raises(ValueError, match=r"must have rank 5.*\(2, 4, 3\)"):
        TemporalConv1D(3)(random_like((2, 4, 3)))
    with pytest.raises(ValueError, match=r"filters=6 for an input of 4 channels"):
        TemporalConv1D(6, depthwise=True)(random_like((1, 2, 4, 4, 4)))


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
def test_depthwise_equals_its_definition(kernel_size):
    x = random_like((2, 4, 3, 2, 5))
    layer = TemporalConv1D(kernel_size=kernel_size, depthwise=True, use_bias=True)
    layer.build(x.shape)
    randomize_weights(layer)
    with literal_definitions():
        expected = keras.ops.convert_to_numpy(layer(x))
    assert_close(layer(x), expected)
