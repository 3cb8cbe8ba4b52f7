import keras

from tokenlearner_keras.layers._checks import check_positive_int, check_rate
from tokenlearner_keras.layers._initializers import clone_initializer
from tokenlearner_keras.layers._layer_normalization import LayerNormalization
from tokenlearner_keras.layers.activations import gelu
from tokenlearner_keras.layers.stochastic_depth import StochasticDepth
from tokenlearner_keras.layers.vector_attention import VectorAttention


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class VectorTransformerBlock(keras.layers.Layer):
    """A pre-LayerNorm Transformer block with vector attention (section 3.1).

    `x = x + attention(norm(x))`, then `x = x + mlp(norm(x))`, where `attention` is
    `VectorAttention` on all channels of `x` and `mlp` has one hidden layer with gelu
    (tanh approximation).

    Args:
        mlp_dim: int. Hidden channels of the MLP.
        dropout: float. Dropout rate after the attention and after both layers of the
            MLP.
        attention_dropout: float. Dropout rate of the attention weights.
        stochastic_depth: float. Rate at which an example skips either residual branch.
        method: Method of the vector attention, see `VectorAttention`.
        scale: float or `None`. Scale of the logits, see `VectorAttention`.
        output_projection: bool. Whether the attention ends in a linear map.
        use_bias: bool. Whether the projections of the attention have biases. The MLP
            always has.
        kernel_initializer: Initializer of all kernels.
        bias_initializer: Initializer of the biases.
        kernel_regularizer: Regularizer of all kernels.
        bias_regularizer: Regularizer of the biases.
        seed: int or `None`. Seed of the dropouts.
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: Tensor of shape `(batch, tokens, channels)`.
        mask: Optional boolean tensor of shape `(batch, tokens)`: tokens that may be
            attended to.
        training: bool. Whether dropout and stochastic depth are active.

    Output:
        Tensor with the shape of `inputs`.

    Raises:
        ValueError: at construction for an argument out of range; at build for an input
            that is not of rank 3 or has unknown channels.
    """

    def __init__(
        self,
        mlp_dim,
        dropout=0.0,
        attention_dropout=0.0,
        stochastic_depth=0.0,
        method="auto",
        scale=None,
        output_projection=False,
        use_bias=False,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.mlp_dim = check_positive_int("mlp_dim", mlp_dim)
        self.dropout = check_rate("dropout", dropout)
        self.attention_dropout = check_rate("attention_dropout", attention_dropout)
        self.stochastic_depth = check_rate("stochastic_depth", stochastic_depth)
        self.use_bias = bool(use_bias)
        self.output_projection = bool(output_projection)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.seed = seed
        self.supports_masking = True
        self.attention_norm, self.mlp_norm = (
            LayerNormalization(epsilon=1e-6, name=name, dtype=self.dtype_policy)
            for name in ("attention_norm", "mlp_norm")
        )
        self.attention = VectorAttention(
            method=method,
            scale=scale,
            output_projection=output_projection,
            use_bias=use_bias,
            dropout=attention_dropout,
            seed=seed,
            name="attention",
            **self._common_arguments(),
        )
        self.dropout_layer = keras.layers.Dropout(
            self.dropout, seed=seed, dtype=self.dtype_policy, name="dropout"
        )
        self.stochastic_depth_layer = StochasticDepth(
            self.stochastic_depth,
            seed=seed,
            dtype=self.dtype_policy,
            name="stochastic_depth",
        )

    @property
    def method(self) -> str:
        """Method of the vector attention."""
        return self.attention.method

    def build(self, input_shape):
        if len(input_shape) != 3 or input_shape[-1] is None:
            raise ValueError(
                f"The input of layer '{self.name}' must have rank 3 (batch, tokens, "
                "channels) and known channels. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        channels = input_shape[-1]
        self.attention_norm.build(input_shape)
        self.attention.build(input_shape)
        self.mlp_norm.build(input_shape)
        self.mlp_layers = []
        width = channels
        for index, units in enumerate((self.mlp_dim, channels)):
            layer = keras.layers.Dense(
                units, name=f"mlp_{index}", **self._common_arguments()
            )
            layer.build((None, None, width))
            self.mlp_layers.append(layer)
            width = units

    def call(self, inputs, mask=None, training=None):
        x = self.attention(self.attention_norm(inputs), mask=mask, training=training)
        x = self.dropout_layer(x, training=training)
        x = inputs + self.stochastic_depth_layer(x, training=training)
        hidden, output = self.mlp_layers
        y = self.dropout_layer(gelu(hidden(self.mlp_norm(x))), training=training)
        y = self.dropout_layer(output(y), training=training)
        return x + self.stochastic_depth_layer(y, training=training)

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "mlp_dim": self.mlp_dim,
                "dropout": self.dropout,
                "attention_dropout": self.attention_dropout,
                "stochastic_depth": self.stochastic_depth,
                "method": self.attention.method,
                "scale": self.attention.scale,
                "output_projection": self.output_projection,
                "use_bias": self.use_bias,
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

    def _common_arguments(self):
        return {
            "kernel_initializer": clone_initializer(self.kernel_initializer),
            "bias_initializer": clone_initializer(self.bias_initializer),
            "kernel_regularizer": self.kernel_regularizer,
            "bias_regularizer": self.bias_regularizer,
            "dtype": self.dtype_policy,
        }
