import keras
from keras import ops

from tokenlearner_keras.layers._checks import check_channels
from tokenlearner_keras.layers._initializers import clone_initializer


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class PriorAttention(keras.layers.Layer):
    """Attention whose weights are learned, and do not depend on the input.

    The "prior-only attention" of Table 6 of
    [TokenLearner](https://arxiv.org/abs/2106.11297v1), which the paper only names. Here
    it is the vector transformer without queries and keys: `y_i = sum_j
    softmax_j(prior[i, j]) * f_v(z_j)`, with one weight for each pair of positions.

    Args:
        use_bias: bool. Whether the value projection has a bias.
        kernel_initializer: Initializer of the value kernel.
        prior_initializer: Initializer of the logits. Zeros start as a mean.
        kernel_regularizer: Regularizer of the value kernel.
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: Tensor of shape `(batch, positions, channels)`. The number of positions
            must be known: the weights depend on it.

    Output:
        Tensor with the shape of the input.

    Raises:
        ValueError: at build for an input of another rank, unknown positions or
            channels, or other positions than the layer was built for.
    """

    def __init__(
        self,
        use_bias=False,
        kernel_initializer="glorot_uniform",
        prior_initializer="zeros",
        kernel_regularizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.prior_initializer = keras.initializers.get(prior_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)

    def build(self, input_shape):
        self._check_input_shape(input_shape)
        positions, channels = input_shape[1:]
        self.prior = self.add_weight(
            shape=(positions, positions),
            initializer=clone_initializer(self.prior_initializer),
            name="prior",
        )
        self.value_dense = keras.layers.Dense(
            channels,
            use_bias=self.use_bias,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            kernel_regularizer=self.kernel_regularizer,
            dtype=self.dtype_policy,
            name="value",
        )
        self.value_dense.build((None, None, channels))

    def call(self, inputs):
        weights = ops.softmax(ops.convert_to_tensor(self.prior), axis=-1)
        weights = ops.cast(weights, self.compute_dtype)
        return ops.einsum("ij,bjc->bic", weights, self.value_dense(inputs))

    def compute_output_shape(self, input_shape):
        self._check_input_shape(input_shape)
        return tuple(input_shape)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "use_bias": self.use_bias,
                "kernel_initializer": keras.initializers.serialize(
                    self.kernel_initializer
                ),
                "prior_initializer": keras.initializers.serialize(
                    self.prior_initializer
                ),
                "kernel_regularizer": keras.regularizers.serialize(
                    self.kernel_regularizer
                ),
            }
        )
        return config

    def _check_input_shape(self, input_shape):
        if len(input_shape) != 3 or input_shape[1] is None:
            raise ValueError(
                f"The input of layer '{self.name}' must have rank 3 (batch, positions, "
                "channels), with known positions. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        check_channels(self, input_shape)
        if self.built and input_shape[1] != self.prior.shape[0]:
            raise ValueError(
                f"Layer '{self.name}' was built for {self.prior.shape[0]} positions. "
                f"Received: {input_shape[1]} positions"
            )
