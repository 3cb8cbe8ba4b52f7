import math

import keras
from keras import ops

from tokenlearner_keras.layers._checks import (
    check_channels,
    check_divisible,
    check_positive_int,
    check_sizes,
)
from tokenlearner_keras.layers._initializers import clone_initializer


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class PatchEmbedding(keras.layers.Layer):
    """Cuts an image into patches and maps each linearly to a token.

    [ViT](https://arxiv.org/abs/2010.11929), section 3.1: one strided convolution.

    Args:
        hidden_dim: int. Channels of the tokens.
        patch_size: int or pair of ints. Height and width of a patch in pixels; they
            must divide the image.
        kernel_initializer: Initializer of the kernel.
        bias_initializer: Initializer of the bias.
        kernel_regularizer: Regularizer of the kernel.
        bias_regularizer: Regularizer of the bias.
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: Tensor of shape `(batch, height, width, channels)`.

    Output:
        Tensor of shape `(batch, positions, hidden_dim)`, the grid of
        `compute_grid_shape` flattened in row-major order.

    Raises:
        ValueError: at construction for an argument out of range; at build for an input
            of another rank or size.
    """

    def __init__(
        self,
        hidden_dim,
        patch_size=16,
        kernel_initializer="lecun_normal",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.hidden_dim = check_positive_int("hidden_dim", hidden_dim)
        self.patch_size = check_sizes("patch_size", patch_size, 2)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)

    def build(self, input_shape):
        self.compute_grid_shape(input_shape)
        self.projection = keras.layers.Conv2D(
            self.hidden_dim,
            self.patch_size,
            strides=self.patch_size,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            bias_initializer=clone_initializer(self.bias_initializer),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            name="projection",
            dtype=self.dtype_policy,
        )
        self.projection.build(input_shape)

    def call(self, inputs):
        x = self.projection(inputs)
        return ops.reshape(x, (-1, math.prod(ops.shape(x)[1:-1]), self.hidden_dim))

    def compute_grid_shape(self, input_shape) -> tuple[int | None, ...]:
        """Returns the grid of tokens, (height, width), for an input shape."""
        if len(input_shape) != 4:
            raise ValueError(
                f"The input of layer '{self.name}' must have rank 4 "
                "(batch, height, width, channels). "
                f"Received: input_shape={tuple(input_shape)}"
            )
        check_channels(self, input_shape)
        check_divisible(self, "patch_size", self.patch_size, input_shape)
        return tuple(
            None if size is None else size // step
            for size, step in zip(input_shape[1:-1], self.patch_size)
        )

    def compute_output_shape(self, input_shape):
        grid_shape = self.compute_grid_shape(input_shape)
        positions = None if None in grid_shape else math.prod(grid_shape)
        return (input_shape[0], positions, self.hidden_dim)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "hidden_dim": self.hidden_dim,
                "patch_size": self.patch_size,
                "kernel_initializer": keras.initializers.serialize(
                    self.kernel_initializer
                ),
                "bias_initializer": keras.initializers.serialize(self.bias_initializer),
                "kernel_regularizer": keras.regularizers.serialize(
                    self.kernel_regularizer
                ),
                "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            }
        )
        return config
