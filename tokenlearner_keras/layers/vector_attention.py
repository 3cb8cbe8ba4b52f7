import keras
from keras import ops

from tokenlearner_keras.layers._checks import (
    check_channels,
    check_choice,
    check_positive_int,
    check_rate,
)
from tokenlearner_keras.layers._forms import is_literal
from tokenlearner_keras.layers._initializers import clone_initializer
from tokenlearner_keras.ops import vector_attention
from tokenlearner_keras.ops._gamma import gamma_attention
from tokenlearner_keras.ops.vector_attention import (
    METHODS,
    packed_attention,
    resolve_method,
)


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class VectorAttention(keras.layers.Layer):
    """Attention with one softmax a channel: "pairwise vector attention".

    Equation 2 of [TokenLearner](https://arxiv.org/abs/2106.11297v1):
    `y_i = sum_j softmax_j(gamma(f_q(z_i) * f_k(z_j))) * f_v(z_j)`, products taken
    channel by channel. It is multi-head attention with as many heads as channels. With
    the default `method`, time and memory are linear in the number of tokens; see
    `tokenlearner_keras.ops.vector_attention`.

    Args:
        dim: int or `None`. Channels of the query and key projections. `None` takes the
            channels of the query.
        value_dim: int or `None`. Channels of the value projection. `None` takes `dim`.
            Another number needs `gamma`.
        method: `"auto"`, `"dense"`, `"streaming"` or `"interpolated"`; the method of
            `tokenlearner_keras.ops.vector_attention`.
        scale: float or `None`. Factor of the logits. `None` is one: the scaled dot
            product's `1 / sqrt(head size)` for heads of one channel, and equation 2 as
            printed.
        output_projection: bool. Whether a linear map to the channels of the query
            follows. The paper has none.
        use_bias: bool. Whether the projections have biases.
        gamma: bool or `None`. Whether the paper's extra projection, a bias-free linear
            map from `dim` to `value_dim`, acts on the products before the softmax.
            `None` uses it exactly where `dim` and `value_dim` differ. It takes
            quadratic time (streaming, or `method="dense"`).
        dropout: float. Dropout rate of the attention weights. While training it takes
            quadratic time (streaming, or `method="dense"`).
        kernel_initializer: Initializer of all kernels.
        bias_initializer: Initializer of the biases.
        kernel_regularizer: Regularizer of all kernels.
        bias_regularizer: Regularizer of the biases.
        seed: int or `None`. Seed of the dropout.
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        query: Tensor of shape `(batch, queries, channels)`.
        value: Tensor of shape `(batch, keys, value_channels)`. `None` is `query`.
        key: Tensor of shape `(batch, keys, key_channels)`. `None` is `value`.
        mask: Boolean tensor of shape `(batch, keys)` or `(batch, queries, keys)`, true
            where a key may be attended to. A query without any key gets zeros. `None`
            takes the Keras mask of the keys, if there is one.
        return_attention_scores: bool. Whether to return the weights as well. Needs
            `method="dense"`: no other method forms them.
        training: bool. Whether dropout is active.

    Output:
        Tensor of shape `(batch, queries, value_dim)`, or
        `(batch, queries, channels)` with `output_projection=True`. With
        `return_attention_scores=True`, a pair: that, and the weights of shape
        `(batch, queries, keys, value_dim)`.

    Raises:
        ValueError: at construction for an argument out of range; at build for inputs
            that are not of rank 3, have unknown channels, or for `gamma=False` with
            different `dim` and `value_dim`; at the call for scores without
            `method="dense"`.

    Example:

    >>> tokens = keras.random.normal((2, 512, 432))
    >>> VectorAttention()(tokens).shape
    (2, 512, 432)
    """

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
        self.scale = None if scale is None else _check_scale(scale)
        self.output_projection = bool(output_projection)
        self.use_bias = bool(use_bias)
        self.gamma = check_choice("gamma", gamma, (None, False, True))
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
        for name, shape in (
            ("query", query_shape),
            ("value", value_shape),
            ("key", key_shape),
        ):
            if len(shape) != 3:
                raise ValueError(
                    f"The {name} of layer '{self.name}' must have rank 3 (batch, "
                    f"tokens, channels). Received: {name} of shape {tuple(shape)}"
                )
        channels = check_channels(self, query_shape)
        check_channels(self, value_shape)
        check_channels(self, key_shape)
        dim, value_dim = self._dims(query_shape)
        if self.gamma is False and dim != value_dim:
            raise ValueError(
                f"Layer '{self.name}' needs the projection `gamma` where `dim` and "
                f"`value_dim` differ. Received: gamma=False, dim={dim}, "
                f"value_dim={value_dim}"
            )
        self._has_gamma = dim != value_dim if self.gamma is None else self.gamma
        if self._has_gamma:
            resolve_method(self.method, gamma=True)
        self.query_dense = self._dense(dim, query_shape, "query")
        self.key_dense = self._dense(dim, key_shape, "key")
        self.value_dense = self._dense(value_dim, value_shape, "value")
        if self._has_gamma:
            self._gamma_inputs = dim
            self.gamma_dense = self._dense(value_dim, (None, None, dim), "gamma", False)
        if self.output_projection:
            self.output_dense = self._dense(channels, (None, None, value_dim), "output")
        if self.dropout > 0:
            resolve_method(self.method, dropout=self.dropout)
            self.seed_generator = keras.random.SeedGenerator(self.seed)

    def call(
        self,
        query,
        value=None,
        key=None,
        mask=None,
        return_attention_scores=False,
        training=None,
    ):
        if return_attention_scores and self.method != "dense":
            raise ValueError(
                '`return_attention_scores=True` needs `method="dense"`: the other '
                "methods never form the scores. "
                f"Received: method={self.method!r} in layer '{self.name}'"
            )
        value = query if value is None else value
        key = value if key is None else key
        if mask is None:
            mask = getattr(key, "_keras_mask", None)
        packed = None
        if query is key is value and mask is None and not return_attention_scores:
            packed = self._packed_attention(query, training)
        if packed is not None:
            x = packed(self._project(query))
            return self.output_dense(x) if self.output_projection else x
        tensors = self.query_dense(query), self.key_dense(key), self.value_dense(value)
        arguments = {
            "mask": mask,
            "scale": 1.0 if self.scale is None else self.scale,
            "dropout": self.dropout if training else 0.0,
        }
        if training and self.dropout > 0:
            arguments["seed"] = self.seed_generator.next()
        scores = None
        if self._has_gamma or return_attention_scores:
            kernel = self._gamma_kernel() if self._has_gamma else None
            x, scores = gamma_attention(
                *tensors,
                kernel,
                dense=resolve_method(self.method, gamma=self._has_gamma) == "dense",
                **arguments,
            )
        else:
            x = vector_attention(*tensors, method=self.method, **arguments)
        if self.output_projection:
            x = self.output_dense(x)
        return (x, scores) if return_attention_scores else x

    def _packed_attention(self, query, training):
        """Attention of one tensor that holds queries, keys and values, or `None`."""
        layers = self.query_dense, self.key_dense, self.value_dense
        if (
            is_literal()
            or self._has_gamma
            or self.scale not in (None, 1.0)
            or (training and self.dropout > 0)
            or any(
                type(layer) is not keras.layers.Dense
                or layer.lora_enabled
                or layer.quantization_mode is not None
                for layer in layers
            )
        ):
            return None
        return packed_attention(query.shape[1], self.compute_dtype, self.method)

    def _project(self, x):
        """Queries, keys and values side by side: one matrix product, not three."""
        layers = self.query_dense, self.key_dense, self.value_dense
        x = ops.matmul(
            ops.cast(x, self.compute_dtype),
            ops.concatenate(
                [ops.cast(layer.kernel, self.compute_dtype) for layer in layers], axis=1
            ),
        )
        if self.use_bias:
            biases = [ops.cast(layer.bias, self.compute_dtype) for layer in layers]
            x = x + ops.concatenate(biases)
        return x

    def compute_mask(self, query, previous_mask=None):
        # `mask` belongs to the keys; the output has the tokens of the query.
        return getattr(query, "_keras_mask", None)

    def compute_output_shape(self, query_shape, value_shape=None, key_shape=None):
        channels = query_shape[-1]
        if not self.output_projection:
            channels = self._dims(query_shape)[1]
        return (*query_shape[:-1], channels)

    def compute_output_spec(
        self,
        query,
        value=None,
        key=None,
        mask=None,
        return_attention_scores=False,
        training=None,
    ):
        output = keras.KerasTensor(
            self.compute_output_shape(query.shape), dtype=self.compute_dtype
        )
        if not return_attention_scores:
            return output
        value = query if value is None else value
        shape = (*query.shape[:2], value.shape[1], self._dims(query.shape)[1])
        return output, keras.KerasTensor(shape, dtype=self.compute_dtype)

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

    def _dims(self, query_shape):
        dim = self.dim or query_shape[-1]
        return dim, self.value_dim or dim

    def _gamma_kernel(self):
        """The matrix of `gamma`, whatever form its layer holds it in."""
        identity = ops.eye(self._gamma_inputs, dtype=self.compute_dtype)
        # Through the layer, so that LoRA and quantized kernels count.
        return self.gamma_dense(identity)

    def _dense(self, units, input_shape, name, use_bias=None):
        layer = keras.layers.Dense(
            units,
            use_bias=self.use_bias if use_bias is None else use_bias,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            bias_initializer=clone_initializer(self.bias_initializer),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build(input_shape)
        return layer


def _check_scale(scale):
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(
            f"Argument `scale` must be a number or `None`. Received: scale={scale!r}"
        )
    return float(scale)
