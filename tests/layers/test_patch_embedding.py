import keras
import numpy as np
import pytest
from keras import ops

from tests.contract import assert_close, random_like, run_layer_contract
from tokenlearner_keras.layers import PatchEmbedding


def test_contract(tmp_path):
    run_layer_contract(
        lambda **kwargs: PatchEmbedding(16, (4, 3), **kwargs),
        (2, 8, 9, 3),
        (2, 6, 16),
        tmp_path,
        num_weights=12 * 3 * 16 + 16,
    )


def test_values():
    """Token (row-major) is the linear map of its own pixels and of no others."""
    layer = PatchEmbedding(5, (4, 3), bias_initializer="ones")
    x = random_like((2, 8, 9, 3))
    outputs = ops.convert_to_numpy(layer(x))
    kernel = ops.convert_to_numpy(layer.projection.kernel.value)
    size, grid = (4, 3), (2, 3)
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
    assert PatchEmbedding(4, 2).patch_size == (2, 2)


def test_unknown_size():
    layer = PatchEmbedding(4, 2)
    outputs = layer(keras.Input((None, None, 3)))
    assert outputs.shape == (None, None, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "`hidden_dim` must be an integer of at least 1"),
        ((4, 0), r"`patch_size\[0\]` must be an integer of at least 1"),
        ((4, 2.5), "`patch_size` must be an integer or 2 integers"),
        ((4, (2,) * 3), "`patch_size` must be an integer or 2 integers"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchEmbedding(*arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 8, 9), "must have rank 4"),
        ((2, 8, 9, None), r"\(channels\) .* must be known"),
        ((2, 8, 10, 3), r"`patch_size` .* must divide"),
    ],
)
def test_bad_input(shape, message):
    with pytest.raises(ValueError, match=message):
        PatchEmbedding(4, (4, 3))(keras.Input(batch_shape=shape))
