import keras
import numpy as np
import pytest
from keras import ops

from tests.contract import assert_close, random_like, run_layer_contract
from tokenlearner_keras.layers import TubeletEmbedding


def test_contract(tmp_path):
    run_layer_contract(
        lambda **kwargs: TubeletEmbedding(16, (2, 4, 3), **kwargs),
        (2, 4, 8, 9, 3),
        (2, 12, 16),
        tmp_path,
        num_weights=24 * 3 * 16 + 16,
    )


def test_values():
    """Token (row-major) is the linear map of its own pixels and of no others."""
    layer = TubeletEmbedding(5, (2, 4, 3), bias_initializer="ones")
    x = random_like((2, 4, 8, 9, 3))
    outputs = ops.convert_to_numpy(layer(x))
    kernel = ops.convert_to_numpy(layer.projection.kernel.value)
    size, grid = (2, 4, 3), (2, 2, 3)
    assert layer.compute_grid_shape(x.shape) == grid
    expected = np.zeros((2, *grid, 5), "float32")
    for place in np.ndindex(grid):
        window = tuple(
            slice(step * start, step * (start + 1)) for start, step in zip(place, size)
        )
        pixels = x[(slice(None), *window)].reshape(2, -1)
        expected[(slice(None), *place)] = pixels @ kernel.reshape(-1, 5) + 1
    assert_close(outputs, expected.reshape(2, -1, 5))


def test_one_integer_is_the_size_of_all_axes():
    assert TubeletEmbedding(4, 2).tubelet_size == (2, 2, 2)


def test_unknown_size():
    layer = TubeletEmbedding(4, 2)
    outputs = layer(keras.Input((None, None, None, 3)))
    assert outputs.shape == (None, None, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "`hidden_dim` must be an integer of at least 1"),
        ((4, 0), r"`tubelet_size\[0\]` must be an integer of at least 1"),
        ((4, 2.5), "`tubelet_size` must be an integer or 3 integers"),
        ((4, (2,) * 4), "`tubelet_size` must be an integer or 3 integers"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TubeletEmbedding(*arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 8, 9, 3), "must have rank 5"),
        ((2, 4, 8, 9, None), r"\(channels\) .* must be known"),
        ((2, 3, 8, 9, 3), r"`tubelet_size` .* must divide"),
    ],
)
def test_bad_input(shape, message):
    with pytest.raises(ValueError, match=message):
        TubeletEmbedding(4, (2, 4, 3))(keras.Input(batch_shape=shape))
