import keras
import numpy as np
import pytest

from tests.contract import assert_close, random_like, run_layer_contract
from tokenlearner_keras.layers import (
    MultiHeadSelfAttention,
    SpaceTimeAttention,
    VectorAttention,
)


@pytest.mark.parametrize("over", ["space_time", "space", "time"])
def test_contract(over, tmp_path):
    def make_layer(**kwargs):
        dtype = {"dtype": kwargs["dtype"]} if "dtype" in kwargs else {}
        attention = MultiHeadSelfAttention(2, 3, name="attention", **dtype)
        return SpaceTimeAttention(attention, over, **kwargs)

    shape = (2, 3, 2, 4, 8)
    run_layer_contract(make_layer, shape, shape, tmp_path, num_weights=8 * 20)


@pytest.mark.parametrize("attention", [MultiHeadSelfAttention(2, 3), VectorAttention()])
def test_what_attends_to_what(attention):
    x = random_like((2, 3, 2, 4, 8))

    def reference(sequences):
        return keras.ops.convert_to_numpy(attention(np.ascontiguousarray(sequences)))

    expected = reference(x.reshape(2, 24, 8)).reshape(x.shape)
    assert_close(SpaceTimeAttention(attention)(x), expected)
    expected = reference(x.reshape(6, 8, 8)).reshape(x.shape)
    assert_close(SpaceTimeAttention(attention, "space")(x), expected)
    expected = np.empty_like(x)
    for row in range(2):
        for column in range(4):
            expected[:, :, row, column] = reference(x[:, :, row, column])
    assert_close(SpaceTimeAttention(attention, "time")(x), expected)


def test_unknown_sizes():
    inputs = keras.Input((None, None, None, 8))
    layer = SpaceTimeAttention(MultiHeadSelfAttention(2, 3), "time")
    outputs = layer(inputs)
    assert tuple(outputs.shape) == (None, None, None, None, 8)
    x = random_like((2, 3, 2, 4, 8))
    assert_close(keras.Model(inputs, outputs)(x), layer(x))


def test_bad_input():
    with pytest.raises(ValueError, match=r"argument `over`.*over='frames'"):
        SpaceTimeAttention(MultiHeadSelfAttention(), "frames")
    with pytest.raises(ValueError, match=r"`attention` must be a Keras layer.*3"):
        SpaceTimeAttention(3)
    with pytest.raises(ValueError, match="must have rank 5"):
        SpaceTimeAttention(MultiHeadSelfAttention())(random_like((1, 4, 16)))
