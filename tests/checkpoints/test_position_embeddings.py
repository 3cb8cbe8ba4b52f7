import numpy as np
import pytest
import scipy.ndimage

from tests.contract import random_like
from tokenlearner_keras.checkpoints import resize_position_embeddings


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((14, 14), (24, 24)),
        ((24, 24), (14, 14)),
        ((14, 14), (12, 20)),
        ((7, 7), (7, 9)),
        ((5, 8), (11, 3)),
        ((3, 4), (4, 3)),
        ((14, 14), (1, 1)),
        ((1, 1), (3, 2)),
        ((2, 1), (5, 4)),
    ],
)
def test_equals_scipy_zoom(old, new):
    grid = random_like((*old, 6))
    zoom = (new[0] / old[0], new[1] / old[1], 1)
    expected = scipy.ndimage.zoom(grid, zoom, order=1)
    actual = resize_position_embeddings(grid.reshape(1, -1, 6), old, new)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual.reshape(*new, 6), expected, rtol=0, atol=1e-6)


def test_the_same_grid_is_returned_as_it_is():
    embeddings = random_like((1, 12, 6))
    assert resize_position_embeddings(embeddings, (3, 4), (3, 4)) is embeddings


def test_corners_stay_and_planes_are_exact():
    rows, columns = np.meshgrid(np.arange(5.0), np.arange(7.0), indexing="ij")
    plane = (2 * rows - 3 * columns + 1).reshape(1, -1, 1)
    resized = resize_position_embeddings(plane, (5, 7), (9, 4)).reshape(9, 4)
    rows, columns = np.meshgrid(
        np.linspace(0, 4, 9), np.linspace(0, 6, 4), indexing="ij"
    )
    np.testing.assert_allclose(resized, 2 * rows - 3 * columns + 1, atol=1e-12)


def test_wrong_grid():
    with pytest.raises(
        ValueError, match=r"`grid_shape` must multiply .*\(3, 3\) for 12"
    ):
        resize_position_embeddings(random_like((1, 12, 6)), (3, 3), (4, 4))
