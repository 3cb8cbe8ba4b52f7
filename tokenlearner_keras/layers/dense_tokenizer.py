import keras
from keras import ops

from tokenlearner_keras.layers._checks import check_choice
from tokenlearner_keras.layers._frame_tokenizer import FrameTokenizer
from tokenlearner_keras.layers._initializers import clone_initializer

OVER = ("positions", "frame")


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class DenseTokenizer(FrameTokenizer):
    """Generates the tokens of a frame with one fully connected layer.

    The second alternative to TokenLearner in section 5.3 of
    [the paper](https://arxiv.org/abs/2106.11297v1), which models `z_i = A_i(x)`
    directly as a dense layer. The paper does not say what the layer connects:

    - `over="positions"`: a linear map from the positions of a frame to its tokens,
      shared by the channels (as the paper's TokenFuser is): `tokens[s, c] = sum_p
      kernel[p, s] * inputs[p, c] + bias[s]`. It has `height * width * num_tokens`
      weights.
    - `over="frame"`: from all positions and channels of a frame to all tokens and
      channels; `channels` squared times as many weights (95.6 million for a frame of
      8 x 8 x 432 and 8 tokens).

    Args:
        num_tokens: int. Number of tokens of each image or frame.
        over: `"positions"` or `"frame"`: what the layer connects.
        use_bias: bool. Whether the layer has a bias.
        grid_shape: pair of ints or `None`. Height and width of the grid, for inputs
            whose positions are flattened. `None` takes a square grid.
        kernel_initializer: Initializer of the kernel.
        bias_initializer: Initializer of the bias.
        kernel_regularizer: Regularizer of the kernel.
        bias_regularizer: Regularizer of the bias.
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: Tensor of shape `(batch, height, width, channels)`,
            `(batch, height * width, channels)` or
            `(batch, time, height, width, channels)`. Height and width must be known:
            the weights depend on them.

    Output:
        Tokens of shape `(batch, num_tokens, channels)`, or
        `(batch, time * num_tokens, channels)` for a video, frame-major.

    Raises:
        ValueError: at construction for an argument out of range; at build for an input
            of another rank, unknown height, width or channels, positions that do not
            fit `grid_shape`, or fewer positions than tokens.
    """

    def __init__(
        self,
        num_tokens=8,
        over="positions",
        use_bias=False,
        grid_shape=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        **kwargs,
    ):
        super().__init__(num_tokens, grid_shape, **kwargs)
        self.over = check_choice("over", over, OVER)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)

    def build(self, input_shape):
        height, width = self._check_input_shape(input_shape)
        channels = input_shape[-1]
        self.positions = height * width
        units, width_in = self.num_tokens, self.positions
        if self.over == "frame":
            units, width_in = units * channels, width_in * channels
        self.dense = keras.layers.Dense(
            units,
            use_bias=self.use_bias,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            bias_initializer=clone_initializer(self.bias_initializer),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            dtype=self.dtype_policy,
            name="dense",
        )
        self.dense.build((None, width_in))

    def tokenize(self, frames, training=None):
        channels = frames.shape[-1]
        if self.over == "frame":
            x = ops.reshape(frames, (-1, self.positions * channels))
            return ops.reshape(self.dense(x), (-1, self.num_tokens, channels))
        x = ops.reshape(frames, (-1, self.positions, channels))
        x = self.dense(ops.transpose(x, (0, 2, 1)))
        return ops.transpose(x, (0, 2, 1))

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "over": self.over,
                "use_bias": self.use_bias,
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

    def _check_input_shape(self, input_shape):
        height, width = super()._check_input_shape(input_shape)
        if height is None or width is None:
            raise ValueError(
                f"Layer '{self.name}' needs a known height and width: its weights "
                f"depend on them. Received: input_shape={tuple(input_shape)}"
            )
        self._check_positions(height, width)
        if self.built and height * width != self.positions:
            raise ValueError(
                f"Layer '{self.name}' was built for {self.positions} positions a "
                f"frame. Received: {height} x {width} = {height * width} positions "
                f"(input_shape={tuple(input_shape)})"
            )
        return height, width
