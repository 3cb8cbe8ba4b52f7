import keras

from tokenlearner_keras.layers._checks import (
    check_channels,
    check_positive_int,
    check_rate,
)
from tokenlearner_keras.layers._initializers import SquareInitializer, clone_initializer
from tokenlearner_keras.layers._layer_normalization import LayerNormalization
from tokenlearner_keras.layers.activations import gelu
from tokenlearner_keras.layers.stochastic_depth import StochasticDepth


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class TransformerBlock(keras.layers.Layer):
    """A pre-LayerNorm Transformer block as in ViT.

    1. `x = inputs + attention(norm(inputs))`: multi-head self-attention.
    2. `outputs = x + mlp(norm(x))`: one hidden layer with gelu (tanh approximation).

    All linear maps have biases. [ViT](https://arxiv.org/abs/2010.11929), figure 1.

    Args:
        num_heads: int. Number of attention heads; must divide the channels.
        mlp_dim: int. Hidden channels of the MLP.
        dropout: float. Dropout rate after the attention and after both layers of the
            MLP.
        attention_dropout: float. Dropout rate of the attention weights.
        stochastic_depth: float. Rate at which an example skips either branch.
        kernel_initializer: Initializer of all kernels.
        bias_initializer: Initializer of the biases.
        kernel_regularizer: Regularizer of all kernels.
        bias_regularizer: Regularizer of the biases.
        seed: int or `None`. Random seed of dropout and stochastic depth.
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: Tensor of shape `(batch, tokens, channels)`.
        mask: Optional boolean tensor of shape `(batch, tokens)`. Tokens where it is
            false are not attended to.
        training: bool. Whether dropout and stochastic depth are active.
        return_attention_scores: bool. Whether to return the attention weights as well.

    Output:
        Tensor with the shape of `inputs`. With `return_attention_scores=True`, a pair:
        that tensor, and the weights of shape `(batch, num_heads, tokens, tokens)`.

    Raises:
        ValueError: at construction for an argument out of range; at build for an input
            that is not of rank 3, unknown channels, or channels that `num_heads` does
            not divide.
    """

    def __init__(
        self,
        num_heads,
        mlp_dim,
        dropout=0.0,
        attention_dropout=0.0,
        stochastic_depth=0.0,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.mlp_dim = check_positive_int("mlp_dim", mlp_dim)
        self.dropout = check_rate("dropout", dropout)
        self.attention_dropout = check_rate("attention_dropout", attention_dropout)
        self.stochastic_depth = check_rate("stochastic_depth", stochastic_depth)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.seed = seed
        self.supports_masking = True

    def build(self, input_shape):
        self._check_input_shape(input_shape)
        channels = input_shape[-1]
        common = {
            "bias_initializer": clone_initializer(self.bias_initializer),
            "kernel_regularizer": self.kernel_regularizer,
            "bias_regularizer": self.bias_regularizer,
            "dtype": self.dtype_policy,
        }
        self.attention_norm = LayerNormalization(
            epsilon=1e-6, name="attention_norm", dtype=self.dtype_policy
        )
        self.attention_norm.build(input_shape)
        self.attention = keras.layers.MultiHeadAttention(
            self.num_heads,
            channels // self.num_heads,
            dropout=self.attention_dropout,
            kernel_initializer=SquareInitializer(
                clone_initializer(self.kernel_initializer)
            ),
            seed=self._seed(0),
            name="attention",
            **common,
        )
        self.attention.build(input_shape, input_shape)
        self.mlp_norm = LayerNormalization(
            epsilon=1e-6, name="mlp_norm", dtype=self.dtype_policy
        )
        self.mlp_norm.build(input_shape)
        self.mlp_layers = []
        width = channels
        for index, units in enumerate((self.mlp_dim, channels)):
            layer = keras.layers.Dense(
                units,
                kernel_initializer=clone_initializer(self.kernel_initializer),
                name=f"mlp_{index}",
                **common,
            )
            layer.build((None, None, width))
            self.mlp_layers.append(layer)
            width = units
        self.dropout_layer = keras.layers.Dropout(
            self.dropout, seed=self._seed(1), dtype=self.dtype_policy, name="dropout"
        )
        self.stochastic_depth_layer = StochasticDepth(
            self.stochastic_depth,
            seed=self._seed(2),
            dtype=self.dtype_policy,
            name="stochastic_depth",
        )

    def call(self, inputs, mask=None, training=None, return_attention_scores=False):
        x = self.attention_norm(inputs)
        x = self.attention(
            x,
            x,
            attention_mask=None if mask is None else mask[:, None, :],
            training=training,
            return_attention_scores=return_attention_scores,
        )
        if return_attention_scores:
            x, scores = x
        x = self.dropout_layer(x, training=training)
        x = inputs + self.stochastic_depth_layer(x, training=training)

        hidden, output = self.mlp_layers
        y = gelu(hidden(self.mlp_norm(x)))
        y = self.dropout_layer(y, training=training)
        y = self.dropout_layer(output(y), training=training)
        x = x + self.stochastic_depth_layer(y, training=training)
        return (x, scores) if return_attention_scores else x

    def compute_output_shape(self, input_shape):
        self._check_input_shape(input_shape)
        return tuple(input_shape)

    def compute_output_spec(
        self, inputs, mask=None, training=None, return_attention_scores=False
    ):
        shape = self.compute_output_shape(inputs.shape)
        outputs = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return outputs
        scores = keras.KerasTensor(
            (shape[0], self.num_heads, shape[1], shape[1]), dtype=self.compute_dtype
        )
        return outputs, scores

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "num_heads": self.num_heads,
                "mlp_dim": self.mlp_dim,
                "dropout": self.dropout,
                "attention_dropout": self.attention_dropout,
                "stochastic_depth": self.stochastic_depth,
                "kernel_initializer": keras.initializers.serialize(
                    self.kernel_initializer
                ),
                "bias_initializer": keras.initializers.serialize(self.bias_initializer),
                "kernel_regularizer": keras.regularizers.serialize(
                    self.kernel_regularizer
                ),
                "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
                "seed": self.seed,
            }
        )
        return config

    def _seed(self, index):
        # Different streams, so that one mask does not repeat the other.
        return None if self.seed is None else self.seed + index

    def _check_input_shape(self, input_shape):
        if len(input_shape) != 3:
            raise ValueError(
                f"The input of layer '{self.name}' must have rank 3 (batch, tokens, "
                f"channels). Received: input_shape={tuple(input_shape)}"
            )
        channels = check_channels(self, input_shape)
        if channels % self.num_heads:
            raise ValueError(
                f"Argument `num_heads` of layer '{self.name}' must divide the channels "
                f"of its input. Received: num_heads={self.num_heads} for "
                f"{channels} channels"
            )
