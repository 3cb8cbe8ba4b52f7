import keras
from keras import ops

from tokenlearner_keras.layers._checks import (
    check_channels,
    check_grid_shape,
    check_positive_int,
    resolve_grid,
)


class FrameTokenizer(keras.layers.Layer):
    """What the ablation tokenizers share: `TokenLearner`'s inputs and outputs.

    A subclass implements `tokenize(frames, training)`, from
    `(frames, height, width, channels)` to `(frames, num_tokens, channels)`.
    """

    def __init__(self, num_tokens=8, grid_shape=None, **kwargs):
        super().__init__(**kwargs)
        self.num_tokens = check_positive_int("num_tokens", num_tokens)
        self.grid_shape = check_grid_shape(grid_shape)

    def tokenize(self, frames, training=None):
        raise NotImplementedError

    def call(self, inputs, training=None):
        time, height, width = self._grid(inputs)
        # The frames of a video join the batch.
        frames = ops.reshape(inputs, (-1, height, width, inputs.shape[-1]))
        tokens = self.tokenize(frames, training=training)
        return ops.reshape(tokens, (-1, time * self.num_tokens, tokens.shape[-1]))

    def compute_output_shape(self, input_shape):
        self._check_input_shape(input_shape)
        num_tokens = self.num_tokens
        if len(input_shape) == 5:
            time = input_shape[1]
            num_tokens = None if time is None else time * num_tokens
        return (input_shape[0], num_tokens, input_shape[-1])

    def get_config(self):
        config = super().get_config()
        config.update({"num_tokens": self.num_tokens, "grid_shape": self.grid_shape})
        return config

    def _grid(self, inputs):
        """Returns time, height and width; tensors where the shape is unknown."""
        shape = ops.shape(inputs)
        if len(shape) == 3:
            return 1, *resolve_grid(self, inputs.shape[1], self.grid_shape)
        if len(shape) == 4:
            return 1, shape[1], shape[2]
        return shape[1:4]

    def _check_input_shape(self, input_shape):
        """Returns height and width (`None` where unknown) of a valid input shape."""
        if len(input_shape) not in (3, 4, 5):
            raise ValueError(
                f"The input of layer '{self.name}' must have rank 4 (batch, height, "
                "width, channels), rank 3 (batch, height * width, channels) or rank 5 "
                "(batch, time, height, width, channels). "
                f"Received: input_shape={tuple(input_shape)}"
            )
        check_channels(self, input_shape)
        if len(input_shape) == 3:
            return resolve_grid(self, input_shape[1], self.grid_shape)
        height, width = input_shape[-3:-1]
        if self.grid_shape not in (None, (height, width)) and None not in (
            height,
            width,
        ):
            raise ValueError(
                f"`grid_shape` of layer '{self.name}' must equal the height and width "
                f"of its input. Received: grid_shape={self.grid_shape} for "
                f"input_shape={tuple(input_shape)}"
            )
        return height, width

    def _check_positions(self, height, width):
        if None not in (height, width) and self.num_tokens > height * width:
            raise ValueError(
                f"Argument `num_tokens` of layer '{self.name}' must be at most the "
                f"number of positions. Received: num_tokens={self.num_tokens} for "
                f"{height} x {width} = {height * width} positions"
            )
