import keras
from keras import ops

from tokenlearner_keras.layers._checks import check_positive_int, check_rate
from tokenlearner_keras.layers._frame_tokenizer import FrameTokenizer
from tokenlearner_keras.layers._initializers import clone_initializer
from tokenlearner_keras.layers.activations import gelu


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class PoolingTokenizer(FrameTokenizer):
    """Generates the tokens of a frame from its spatial mean with an MLP.

    The third alternative to TokenLearner in section 5.3 of
    [the paper](https://arxiv.org/abs/2106.11297v1): spatial global average pooling of
    every frame, then fully connected layers (two, with gelu in between) whose
    `num_tokens * channels` outputs are the tokens.

    Args:
        num_tokens: int. Number of tokens of each image or frame.
        hidden_dim: int or `None`. Hidden channels of the MLP. `None` takes those of the
            input.
        use_bias: bool. Whether the MLP has biases.
        dropout: float. Dropout rate after the hidden activation.
        grid_shape: pair of ints or `None`. Height and width of the grid, for inputs
            whose positions are flattened. `None` takes a square grid.
        kernel_initializer: Initializer of the kernels.
        bias_initializer: Initializer of the biases.
        kernel_regularizer: Regularizer of the kernels.
        bias_regularizer: Regularizer of the biases.
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: Tensor of shape `(batch, height, width, channels)`,
            `(batch, height * width, channels)` or
            `(batch, time, height, width, channels)`.
        training: bool. Whether dropout is active.

    Output:
        Tokens of shape `(batch, num_tokens, channels)`, or
        `(batch, time * num_tokens, channels)` for a video, frame-major.

    Raises:
        ValueError: at construction for an argument out of range; at build for an input
            of another rank, unknown channels or positions that do not fit
            `grid_shape`.
    """

    def __init__(
        self,
        num_tokens=8,
        hidden_dim=None,
        use_bias=False,
        dropout=0.0,
        grid_shape=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        **kwargs,
    ):
        super().__init__(num_tokens, grid_shape, **kwargs)
        self.hidden_dim = (
            None if hidden_dim is None else check_positive_int("hidden_dim", hidden_dim)
        )
        self.use_bias = bool(use_bias)
        self.dropout = check_rate("dropout", dropout)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)

    def build(self, input_shape):
        self._check_input_shape(input_shape)
        channels = input_shape[-1]
        hidden_dim = self.hidden_dim or channels
        self.dense_layers = []
        for index, (width, units) in enumerate(
            [(channels, hidden_dim), (hidden_dim, self.num_tokens * channels)]
        ):
            layer = keras.layers.Dense(
                units,
                use_bias=self.use_bias,
                kernel_initializer=clone_initializer(self.kernel_initializer),
                bias_initializer=clone_initializer(self.bias_initializer),
                kernel_regularizer=self.kernel_regularizer,
                bias_regularizer=self.bias_regularizer,
                dtype=self.dtype_policy,
                name=f"dense_{index}",
            )
            layer.build((None, width))
            self.dense_layers.append(layer)
        self.dropout_layer = keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy, name="dropout"
        )

    def tokenize(self, frames, training=None):
        hidden, output = self.dense_layers
        x = gelu(hidden(ops.mean(frames, axis=(1, 2))))
        x = output(self.dropout_layer(x, training=training))
        return ops.reshape(x, (-1, self.num_tokens, frames.shape[-1]))

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "hidden_dim": self.hidden_dim,
                "use_bias": self.use_bias,
                "dropout": self.dropout,
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
