import keras

from tokenlearner_keras.layers._checks import (
    check_channels,
    check_choice,
    check_positive_int,
    check_rate,
)
from tokenlearner_keras.layers._initializers import clone_initializer
from tokenlearner_keras.ops.vector_attention import METHODS, vector_attention


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class VectorAttention(keras.layers.Layer):
    def __init__(
        self,
        dim=None,
        value_dim=None,
        method="auto",
        scale=None,
        output_projection=False,
        use_bias=False,
        gamma=None,
        dropout=0.0,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.dim = None if dim is None else check_positive_int("dim", dim)
        self.value_dim = (
            None if value_dim is None else check_positive_int("value_dim", value_dim)
        )
        self.method = check_choice("method", method, METHODS)
        self.scale = scale
        self.output_projection = bool(output_projection)
        self.use_bias = bool(use_bias)
        self.gamma = gamma
        self.dropout = check_rate("dropout", dropout)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.seed = seed
        self.supports_masking = True

    def build(self, query_shape, value_shape=None, key_shape=None):
        value_shape = query_shape if value_shape is None else value_shape
        key_shape = value_shape if key_shape is None else key_shape
        dim = self.dim or check_channels(self, query_shape)
        value_dim = self.value_dim or dim
        self.query_dense = self._dense(dim, query_shape, "query")
        self.key_dense = self._dense(dim, key_shape, "key")
        self.value_dense = self._dense(value_dim, value_shape, "value")
        if self.output_projection:
            self.output_dense = self._dense(
                check_channels(self, query_shape), (None, None, value_dim), "output"
            )

    def call(
        self,
        query,
        value=None,
        key=None,
        mask=None,
        return_attention_scores=False,
        training=None,
    ):
        value = query if value is None else value
        key = value if key is None else key
        x = vector_attention(
            self.query_dense(query),
            self.key_dense(key),
            self.value_dense(value),
            mask=mask,
            scale=1.0 if self.scale is None else self.scale,
            method=self.method,
        )
        if self.output_projection:
            x = self.output_dense(x)
        return x

    def compute_output_shape(self, query_shape, value_shape=None, key_shape=None):
        channels = query_shape[-1]
        if not self.output_projection:
            channels = self.value_dim or self.dim or channels
        return (*query_shape[:-1], channels)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "dim": self.dim,
                "value_dim": self.value_dim,
                "method": self.method,
                "scale": self.scale,
                "output_projection": self.output_projection,
                "use_bias": self.use_bias,
                "gamma": self.gamma,
                "dropout": self.dropout,
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

    def _dense(self, units, input_shape, name):
        layer = keras.layers.Dense(
            units,
            use_bias=self.use_bias,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            bias_initializer=clone_initializer(self.bias_initializer),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build(input_shape)
        return layer
