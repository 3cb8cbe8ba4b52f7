import numpy as np
import pytest

from tests.contract import assert_close, random_like, run_layer_contract
from tokenlearner_keras.layers import GridTokenizer


@pytest.mark.parametrize(
    ("shape", "expected", "arguments"),
    [
        ((2, 6, 5, 12), (2, 4, 12), {}),
        ((2, 30, 12), (2, 4, 12), {"grid_shape": (6, 5)}),
        ((2, 3, 6, 5, 12), (2, 12, 12), {}),
    ],
)
def test_contract(shape, expected, arguments, tmp_path):
    def make_layer(**kwargs):
        return GridTokenizer(4, **arguments, **kwargs)

    run_layer_contract(make_layer, shape, expected, tmp_path, num_weights=0)


@pytest.mark.parametrize(
    ("num_tokens", "cells"), [(8, (2, 4)), (16, (4, 4)), (7, (1, 7)), (1, (1, 1))]
)
def test_default_cells(num_tokens, cells):
    assert GridTokenizer(num_tokens).cells == cells


def test_tokens_are_the_means_of_the_cells():
    x = random_like((2, 8, 8, 3))
    expected = x.reshape(2, 2, 4, 4, 2, 3).mean(axis=(2, 4)).reshape(2, 8, 3)
    assert_close(GridTokenizer(8)(x), expected)


def test_uneven_cells_cover_every_position_once():
    x = random_like((1, 7, 5, 3))
    tokens = np.asarray(GridTokenizer(6, cells=(2, 3))(x)).reshape(2, 3, 3)
    rows, columns = np.arange(7) * 2 // 7, np.arange(5) * 3 // 5
    for r in range(2):
        for c in range(3):
            cell = x[0][rows == r][:, columns == c]
            np.testing.assert_allclose(tokens[r, c], cell.mean((0, 1)), rtol=1e-4)


def test_video_equals_frame_by_frame():
    x = random_like((2, 3, 6, 4, 5))
    layer = GridTokenizer(4)
    frames = np.stack([np.asarray(layer(x[:, t])) for t in range(3)], axis=1)
    assert_close(layer(x), frames.reshape(2, 12, 5))


def test_bad_input():
    with pytest.raises(ValueError, match="`num_tokens` must be an integer of at least"):
        GridTokenizer(0)
    with pytest.raises(ValueError, match=r"`cells` must multiply to .*num_tokens=8"):
        GridTokenizer(8, cells=(2, 3))
    with pytest.raises(ValueError, match=r"cells=\(2, 4\) for a frame of 3 x 3"):
        GridTokenizer(8)(random_like((1, 3, 3, 2)))
    with pytest.raises(ValueError, match="must have rank 4"):
        GridTokenizer(8)(random_like((1, 3)))
