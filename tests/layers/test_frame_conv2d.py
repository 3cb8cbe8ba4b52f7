import keras
import numpy as np
import pytest

from tests.contract import (
    assert_close,
    random_like,
    randomize_weights,
    run_layer_contract,
)
from tokenlearner_keras.layers import FrameConv2D, TemporalConv1D, frame_conv2d


@pytest.mark.parametrize(
    ("arguments", "expected", "num_weights"),
    [
        ({"filters": 6}, (2, 3, 5, 4, 6), 9 * 4 * 6),
        ({"strides": 2, "use_bias": True}, (2, 3, 3, 2, 4), 9 * 16 + 4),
        ({"depthwise": True}, (2, 3, 5, 4, 4), 36),
        ({"filters": 6, "kernel_size": 1, "strides": 2}, (2, 3, 3, 2, 6), 24),
    ],
)
def test_contract(arguments, expected, num_weights, tmp_path):
    def make_layer(**kwargs):
        return FrameConv2D(**arguments, **kwargs)

    shape = (2, 3, 5, 4, 4)
    run_layer_contract(make_layer, shape, expected, tmp_path, num_weights=num_weights)


@pytest.mark.parametrize("strides", [1, 2])
def test_equals_a_3d_convolution_with_a_kernel_of_one_frame(strides):
    x = random_like((2, 3, 6, 5, 4))
    layer = FrameConv2D(7, strides=strides)
    layer.build(x.shape)
    randomize_weights(layer)
    twin = keras.layers.Conv3D(
        7, (1, 3, 3), strides=(1, strides, strides), padding="same", use_bias=False
    )
    twin.build(x.shape)
    twin.set_weights([np.asarray(layer.get_weights()[0])[None]])
    assert_close(layer(x), twin(x))


def test_unknown_sizes():
    inputs = keras.Input((None, None, None, 4))
    layer = FrameConv2D(7, strides=2)
    outputs = layer(inputs)
    assert tuple(outputs.shape) == (None, None, None, None, 7)
    x = random_like((2, 3, 5, 4, 4))
    assert_close(keras.Model(inputs, outputs)(x), layer(x))


def test_bad_input():
    with pytest.raises(ValueError, match=r"`strides` must be.*strides=0"):
        FrameConv2D(3, strides=0)
    with pytest.raises(ValueError, match=r"must have rank 5.*\(2, 4, 4, 3\)"):
        FrameConv2D(3)(random_like((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"filters=6 for an input of 4 channels"):
        FrameConv2D(6, depthwise=True)(random_like((1, 2, 4, 4, 4)))
    with pytest.raises(ValueError, match="channels"):
        FrameConv2D(6)(keras.Input((2, 4, 4, None)))


@pytest.mark.parametrize("make", [FrameConv2D, TemporalConv1D])
@pytest.mark.parametrize(("channels", "filters"), [(9, 16), (16, 6), (9, 6)])
def test_channels_padded_for_tensor_cores_change_nothing(
    make, channels, filters, monkeypatch
):
    x = keras.ops.cast(random_like((2, 3, 6, 5, channels)), "bfloat16")
    layer = make(filters, use_bias=True, dtype="mixed_bfloat16")
    layer.build(x.shape)
    randomize_weights(layer)
    expected = layer(x)
    kernels = []
    convolution = frame_conv2d.ops.conv
    monkeypatch.setattr(frame_conv2d, "on_gpu", lambda: True)
    monkeypatch.setattr(
        frame_conv2d.ops,
        "conv",
        lambda x, kernel, *args, **kwargs: (
            kernels.append(tuple(kernel.shape[2:]))
            or convolution(x, kernel, *args, **kwargs)
        ),
    )
    padded = layer(x)
    assert kernels == [(16, -(-filters // 8) * 8)]
    difference = keras.ops.cast(padded, "float32") - keras.ops.cast(expected, "float32")
    largest = keras.ops.max(keras.ops.abs(keras.ops.cast(expected, "float32")))
    # One rounding to bfloat16.
    assert float(keras.ops.max(keras.ops.abs(difference))) <= 2**-7 * float(largest)
