import numpy as np


def resize_position_embeddings(
    embeddings: np.ndarray,
    grid_shape: tuple[int, int],
    new_grid_shape: tuple[int, int],
) -> np.ndarray:
    """Resizes a grid of position embeddings as the published ViT code does.

    Linear interpolation with aligned corners: the first and the last row and column
    stay where they are. It is `scipy.ndimage.zoom(order=1)` of the grid.

    Args:
        embeddings: Array of shape `(..., height * width, channels)`, row-major.
        grid_shape: `(height, width)` of `embeddings`.
        new_grid_shape: `(height, width)` of the result.

    Returns:
        Array of shape `(..., new_height * new_width, channels)` and the same dtype.

    Raises:
        ValueError: if `grid_shape` does not multiply to the number of positions.
    """
    *leading, positions, channels = embeddings.shape
    if grid_shape[0] * grid_shape[1] != positions:
        raise ValueError(
            "Argument `grid_shape` must multiply to the number of positions. Received: "
            f"grid_shape={tuple(grid_shape)} for {positions} positions"
        )
    if tuple(grid_shape) == tuple(new_grid_shape):
        return embeddings
    rows, columns = (
        _interpolation_matrix(old, new) for old, new in zip(grid_shape, new_grid_shape)
    )
    grid = embeddings.reshape(*leading, *grid_shape, channels)
    resized = np.einsum("...hwc,ih,jw->...ijc", grid, rows, columns, optimize=True)
    return resized.reshape(*leading, -1, channels).astype(embeddings.dtype)


def _interpolation_matrix(old, new):
    """Weights, `(new, old)` in float64, of `new` points between `old` ones."""
    points = np.linspace(0, old - 1, new)
    lower = np.minimum(points.astype(int), max(old - 2, 0))
    upper = np.minimum(lower + 1, old - 1)
    fraction = points - lower
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new), lower), 1 - fraction)
    np.add.at(matrix, (np.arange(new), upper), fraction)
    return matrix
