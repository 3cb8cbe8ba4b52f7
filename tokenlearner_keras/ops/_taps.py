"""The sum of a convolution over the taps of its kernel."""

from keras import ops


def sum_taps(taps, size, filters, dtype):
    """Returns what a convolution with `"same"` padding gives, from its taps.

    Args:
        taps: Tensor of shape `(batch, height, width, size * size * filters)`: what each
            tap of the kernel adds, at the position that it reads.
        size: int. Size of the kernel.
        filters: int.
        dtype: Dtype of the sum.
    """
    _, height, width, _ = ops.shape(taps)
    before = (size - 1) // 2
    border = (before, size - 1 - before)
    taps = ops.pad(taps, ((0, 0), border, border, (0, 0)))
    return sum(
        ops.cast(
            taps[
                :,
                row : row + height,
                column : column + width,
                (row * size + column) * filters : (row * size + column + 1) * filters,
            ],
            dtype,
        )
        for row in range(size)
        for column in range(size)
    )
