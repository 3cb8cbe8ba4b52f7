import math

import keras
from keras import ops

from tokenlearner_keras.layers._checks import check_grid_shape
from tokenlearner_keras.layers._frame_tokenizer import FrameTokenizer


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class GridTokenizer(FrameTokenizer):
    """Splits every frame into a fixed grid of cells; a token is the mean of a cell.

    The first alternative to TokenLearner in section 5.3 of
    [the paper](https://arxiv.org/abs/2106.11297v1): the same number of tokens, from
    cells that do not depend on the input. It has no weights. Cells differ by one
    position where the grid does not divide the frame.

    Args:
        num_tokens: int. Number of cells of each image or frame.
        cells: pair of ints or `None`. Rows and columns of cells, whose product is
            `num_tokens`. `None` takes the most even split with at least as many columns
            as rows: 2 x 4 for 8 tokens.
        grid_shape: pair of ints or `None`. Height and width of the grid, for inputs
            whose positions are flattened. `None` takes a square grid.
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: Tensor of shape `(batch, height, width, channels)`,
            `(batch, height * width, channels)` or
            `(batch, time, height, width, channels)`.

    Output:
        Tokens of shape `(batch, num_tokens, channels)`, or
        `(batch, time * num_tokens, channels)` for a video, frame-major. The cells of a
        frame come row by row.

    Raises:
        ValueError: at construction for an argument out of range; at build for an input
            of another rank, unknown channels, positions that do not fit `grid_shape`,
            or fewer rows or columns than cells.
    """

    def __init__(self, num_tokens=8, cells=None, grid_shape=None, **kwargs):
        super().__init__(num_tokens, grid_shape, **kwargs)
        if cells is None:
            rows = next(
                r
                for r in range(math.isqrt(self.num_tokens), 0, -1)
                if self.num_tokens % r == 0
            )
            cells = (rows, self.num_tokens // rows)
        self.cells = check_grid_shape(cells)
        if math.prod(self.cells) != self.num_tokens:
            raise ValueError(
                "Argument `cells` must multiply to `num_tokens`. "
                f"Received: cells={self.cells}, num_tokens={self.num_tokens}"
            )

    def build(self, input_shape):
        self._check_input_shape(input_shape)

    def tokenize(self, frames, training=None):
        height, width = ops.shape(frames)[1:3]
        tokens = ops.einsum(
            "bhwc,hr,wl->brlc",
            frames,
            self._averaging(height, self.cells[0], frames.dtype),
            self._averaging(width, self.cells[1], frames.dtype),
        )
        return ops.reshape(tokens, (-1, self.num_tokens, frames.shape[-1]))

    def get_config(self):
        config = super().get_config()
        config["cells"] = self.cells
        return config

    def _averaging(self, size, num_cells, dtype):
        """The matrix `(size, num_cells)` that averages the positions of each cell."""
        cell = ops.floor_divide(ops.arange(size) * num_cells, size)
        member = ops.one_hot(cell, num_cells, dtype="float32")
        return ops.cast(member / ops.sum(member, axis=0, keepdims=True), dtype)

    def _check_input_shape(self, input_shape):
        height, width = super()._check_input_shape(input_shape)
        rows, columns = self.cells
        if (height is not None and rows > height) or (
            width is not None and columns > width
        ):
            raise ValueError(
                f"The cells of layer '{self.name}' must be at most as many as the rows "
                f"and columns of its input. Received: cells={self.cells} for a frame "
                f"of {height} x {width} positions"
            )
        return height, width
