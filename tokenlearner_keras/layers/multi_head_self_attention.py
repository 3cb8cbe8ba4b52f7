import keras
from keras import ops

from tokenlearner_keras.layers._checks import check_channels, check_positive_int
from tokenlearner_keras.layers._initializers import clone_initializer


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class MultiHeadSelfAttention(keras.layers.Layer):
    """Scaled dot-product self-attention as in the paper's video modules.

    The transformer that [TokenLearner](https://arxiv.org/abs/2106.11297v1) is compared
    with in Tables 4 and 5. Those tables' costs fix what
    `keras.layers.MultiHeadAttention` has and this layer has not: biases and an output
    projection. The heads' values, side by side, are the output.

    Args:
        num_heads: int. Number of heads.
        key_dim: int. Channels of the queries and keys of each head (16 in the paper:
            128 in all).
        value_dim: int or `None`. Channels of the values of each head. `None` splits the
            channels of the input, so that the output has as many (54 of 432).
        use_bias: bool. Whether the projections have biases.
        kernel_initializer: Initializer of the kernels.
        bias_initializer: Initializer of the biases.
        kernel_regularizer: Regularizer of the kernels.
        bias_regularizer: Regularizer of the biases.
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: Tensor of shape `(batch, positions, channels)`.
        return_attention_scores: bool. Whether to return the attention as well.

    Output:
        Tensor of shape `(batch, positions, num_heads * value_dim)`. With
        `return_attention_scores=True`, a pair: that, and the attention of shape
        `(batch, num_heads, positions, positions)`, whose rows sum to one.

    Raises:
        ValueError: at construction for an argument out of range; at build for an input
            of another rank, unknown channels, or channels that `num_heads` does not
            divide when `value_dim` is `None`.
    """

    def __init__(
        self,
        num_heads=8,
        key_dim=16,
        value_dim=None,
        use_bias=False,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_heads = check_positive_int("num_heads", num_heads)
        self.key_dim = check_positive_int("key_dim", key_dim)
        self.value_dim = (
            None if value_dim is None else check_positive_int("value_dim", value_dim)
        )
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)

    def build(self, input_shape):
        self._check_input_shape(input_shape)
        value_dim = self.value_dim or input_shape[-1] // self.num_heads
        for name, units in (
            ("query", self.key_dim),
            ("key", self.key_dim),
            ("value", value_dim),
        ):
            layer = keras.layers.Dense(
                self.num_heads * units,
                use_bias=self.use_bias,
                kernel_initializer=clone_initializer(self.kernel_initializer),
                bias_initializer=clone_initializer(self.bias_initializer),
                kernel_regularizer=self.kernel_regularizer,
                bias_regularizer=self.bias_regularizer,
                dtype=self.dtype_policy,
                name=name,
            )
            layer.build((None, None, input_shape[-1]))
            setattr(self, f"{name}_dense", layer)

    def call(self, inputs, return_attention_scores=False):
        positions = ops.shape(inputs)[1]
        query, key, value = (
            ops.reshape(
                dense(inputs),
                (-1, positions, self.num_heads, dense.units // self.num_heads),
            )
            for dense in (self.query_dense, self.key_dense, self.value_dense)
        )
        logits = ops.einsum("bqhd,bkhd->bhqk", query, key)
        scores = ops.softmax(logits * self.key_dim**-0.5, axis=-1)
        outputs = ops.einsum("bhqk,bkhd->bqhd", scores, value)
        outputs = ops.reshape(outputs, (-1, positions, self.value_dense.units))
        return (outputs, scores) if return_attention_scores else outputs

    def compute_output_shape(self, input_shape):
        self._check_input_shape(input_shape)
        channels = input_shape[-1]
        if self.value_dim is not None:
            channels = self.num_heads * self.value_dim
        return (*input_shape[:-1], channels)

    def compute_output_spec(self, inputs, return_attention_scores=False):
        shape = self.compute_output_shape(inputs.shape)
        outputs = keras.KerasTensor(shape, dtype=self.compute_dtype)
        if not return_attention_scores:
            return outputs
        shape = (shape[0], self.num_heads, shape[1], shape[1])
        return outputs, keras.KerasTensor(shape, dtype=self.compute_dtype)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "num_heads": self.num_heads,
                "key_dim": self.key_dim,
                "value_dim": self.value_dim,
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
        if len(input_shape) != 3:
            raise ValueError(
                f"The input of layer '{self.name}' must have rank 3 (batch, positions, "
                f"channels). Received: input_shape={tuple(input_shape)}"
            )
        channels = check_channels(self, input_shape)
        if self.value_dim is None and channels % self.num_heads:
            raise ValueError(
                f"Argument `num_heads` of layer '{self.name}' must divide the channels "
                "of its input where `value_dim` is None. Received: "
                f"num_heads={self.num_heads} for {channels} channels"
            )
