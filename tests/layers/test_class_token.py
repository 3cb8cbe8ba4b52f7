import keras
import numpy as np
import pytest
from keras import ops

from tests.contract import random_like, run_layer_contract
from tokenlearner_keras.layers import ClassToken


def test_contract(tmp_path):
    run_layer_contract(
        lambda **kwargs: ClassToken(initializer="ones", regularizer="l2", **kwargs),
        (2, 6, 8),
        (2, 7, 8),
        tmp_path,
        num_weights=8,
    )


def test_values():
    layer = ClassToken(initializer="random_normal")
    x = random_like((3, 4, 8))
    outputs = ops.convert_to_numpy(layer(x))
    token = ops.convert_to_numpy(layer.token.value)
    np.testing.assert_array_equal(outputs[:, 1:], x)
    np.testing.assert_array_equal(outputs[:, :1], np.broadcast_to(token, (3, 1, 8)))


def test_unknown_length_and_mask():
    layer = ClassToken()
    assert layer(keras.Input((None, 8))).shape == (None, None, 8)
    mask = ops.convert_to_tensor(np.array([[True, False]]))
    mask = ops.convert_to_numpy(layer.compute_mask(None, mask))
    np.testing.assert_array_equal(mask, [[True, True, False]])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 4, 8), "must have rank 3"),
        ((2, 4, None), r"\(channels\) .* must be known"),
    ],
)
def test_bad_input(shape, message):
    with pytest.raises(ValueError, match=message):
        ClassToken()(keras.Input(batch_shape=shape))
