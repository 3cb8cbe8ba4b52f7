import keras
from keras import ops

from tokenlearner_keras.layers._checks import (
    check_channels,
    check_choice,
    check_grid_shape,
    check_positive_int,
    check_rate,
    resolve_grid,
)
from tokenlearner_keras.layers._forms import compiled_for_cpu, is_literal, on_gpu
from tokenlearner_keras.layers._initializers import clone_initializer
from tokenlearner_keras.layers._layer_normalization import LayerNormalization
from tokenlearner_keras.layers.activations import gelu
from tokenlearner_keras.ops._taps import sum_taps

ATTENTIONS = ("conv", "mlp")
ACTIVATIONS = ("sigmoid", "softmax")
POOLINGS = ("mean", "sum")


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class TokenLearner(keras.layers.Layer):
    """Learns a few tokens from an image or from every frame of a video.

    The layer computes `num_tokens` spatial attention maps from its input, weights the
    input by each map and pools over the positions, so that each map yields one token
    (equation 1 of [TokenLearner](https://arxiv.org/abs/2106.11297v1)):

    1. `logits = attention(norm(inputs))`: convolutions or an MLP, one channel a token.
    2. `maps = activation(logits)`: a sigmoid, or a softmax over the positions.
    3. `tokens[s] = pool_p(maps[p, s] * inputs[p])`: the mean or the sum over positions.

    Step 3 is one batched matrix product: the `num_tokens` weighted copies of the input
    are never stored. A video is treated frame by frame with shared weights.

    The published variants are class methods that only set arguments: `v1` and `video`
    (the paper), `v10` and `v11` (the authors' code).

    Args:
        num_tokens: int. Number of learned tokens, for each image or frame. At most the
            number of positions.
        attention: `"conv"` or `"mlp"`. The attention function: `num_convs`
            convolutions with `num_tokens` channels, or an MLP on each position with
            `bottleneck_dim` hidden channels. gelu (tanh approximation) in between.
        num_convs: int. Number of convolutions (`attention="conv"`).
        kernel_size: int. Size of the convolutions (`attention="conv"`).
        bottleneck_dim: int. Hidden channels of the MLP (`attention="mlp"`).
        activation: `"sigmoid"` or `"softmax"` (over the positions of a frame).
        pooling: `"mean"` or `"sum"` over the positions. The two differ by the factor
            `height * width`; a softmax, whose maps already sum to one, wants `"sum"`.
        use_norm: bool. Whether the attention function sees a layer-normalised input.
            The pooled features are never normalised.
        use_bias: bool. Whether the attention function has biases.
        value_dim: int or `None`. Channels of a bias-free linear map that is applied to
            every position before the weighting (the fourth matrix of the paper's video
            module). `None` pools the input itself.
        dropout: float. Dropout rate inside the attention function: after each hidden
            activation and on the logits.
        grid_shape: pair of ints or `None`. Height and width of the grid, for inputs
            whose positions are flattened. `None` takes a square grid.
        kernel_initializer: Initializer of all kernels.
        bias_initializer: Initializer of the biases.
        kernel_regularizer: Regularizer of all kernels.
        bias_regularizer: Regularizer of the biases.
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: Tensor of shape `(batch, height, width, channels)`,
            `(batch, height * width, channels)` or
            `(batch, time, height, width, channels)`.
        mask: Optional boolean tensor with the shape of `inputs` less its last axis.
            Positions where it is false get no weight and do not count for the mean.
        training: bool. Whether dropout is active.
        return_attention_maps: bool. Whether to return the maps as well.

    Output:
        Tokens of shape `(batch, num_tokens, channels)`, or
        `(batch, time * num_tokens, channels)` for a video, frame-major: token `s` of
        frame `t` has index `t * num_tokens + s`. `channels` is `value_dim` if given.
        With `return_attention_maps=True`, a pair: the tokens, and the maps of shape
        `(batch, num_tokens, height, width)` or
        `(batch, time, num_tokens, height, width)`.

    Raises:
        ValueError: at construction for an argument out of range; at build for an input
            of another rank, unknown channels, positions that do not fit `grid_shape`,
            or fewer positions than tokens.

    Example:

    >>> images = keras.random.normal((2, 14, 14, 384))
    >>> TokenLearner.v11(num_tokens=8)(images).shape
    (2, 8, 384)
    """

    def __init__(
        self,
        num_tokens=8,
        attention="conv",
        num_convs=3,
        kernel_size=3,
        bottleneck_dim=64,
        activation="sigmoid",
        pooling="mean",
        use_norm=False,
        use_bias=False,
        value_dim=None,
        dropout=0.0,
        grid_shape=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_tokens = check_positive_int("num_tokens", num_tokens)
        self.attention = check_choice("attention", attention, ATTENTIONS)
        self.num_convs = check_positive_int("num_convs", num_convs)
        self.kernel_size = check_positive_int("kernel_size", kernel_size)
        self.bottleneck_dim = check_positive_int("bottleneck_dim", bottleneck_dim)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.pooling = check_choice("pooling", pooling, POOLINGS)
        self.use_norm = bool(use_norm)
        self.use_bias = bool(use_bias)
        self.value_dim = (
            None if value_dim is None else check_positive_int("value_dim", value_dim)
        )
        self.dropout = check_rate("dropout", dropout)
        self.grid_shape = check_grid_shape(grid_shape)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.supports_masking = True

    @classmethod
    def v1(cls, num_tokens: int = 8, **kwargs) -> "TokenLearner":
        """The paper's image module (section 4.1): 3 convolutions, sigmoid, mean."""
        return cls(num_tokens, **{"num_convs": 3, **kwargs})

    @classmethod
    def video(cls, num_tokens: int = 8, **kwargs) -> "TokenLearner":
        """The paper's video module (section 5.1): 1 convolution, sigmoid, mean."""
        return cls(num_tokens, **{"num_convs": 1, **kwargs})

    @classmethod
    def v10(cls, num_tokens: int = 8, **kwargs) -> "TokenLearner":
        """The authors' first code: LayerNorm, 4 convolutions, sigmoid, sum."""
        return cls(
            num_tokens,
            **{"num_convs": 4, "use_norm": True, "pooling": "sum", **kwargs},
        )

    @classmethod
    def v11(cls, num_tokens: int = 8, **kwargs) -> "TokenLearner":
        """The authors' later code: LayerNorm, MLP with biases, softmax, sum."""
        variant = {
            "attention": "mlp",
            "activation": "softmax",
            "pooling": "sum",
            "use_norm": True,
            "use_bias": True,
        }
        return cls(num_tokens, **{**variant, **kwargs})

    def build(self, input_shape):
        self._check_input_shape(input_shape)
        channels = input_shape[-1]
        if self.use_norm:
            self.norm = LayerNormalization(
                epsilon=1e-6, name="norm", dtype=self.dtype_policy
            )
            self.norm.build(input_shape)
        self.attention_layers = []
        if self.attention == "conv":
            shape = (None, None, None, channels)
            for index in range(self.num_convs):
                layer = keras.layers.Conv2D(
                    self.num_tokens,
                    self.kernel_size,
                    padding="same",
                    use_bias=self.use_bias,
                    name=f"conv_{index}",
                    **self._sublayer_arguments(),
                )
                layer.build(shape)
                self.attention_layers.append(layer)
                shape = (*shape[:-1], self.num_tokens)
        else:
            shape = (None, None, channels)
            for index, units in enumerate((self.bottleneck_dim, self.num_tokens)):
                layer = keras.layers.Dense(
                    units,
                    use_bias=self.use_bias,
                    name=f"dense_{index}",
                    **self._sublayer_arguments(),
                )
                layer.build(shape)
                self.attention_layers.append(layer)
                shape = (*shape[:-1], units)
        if self.value_dim is not None:
            self.value_dense = keras.layers.Dense(
                self.value_dim,
                use_bias=False,
                name="value",
                **self._sublayer_arguments(use_bias=False),
            )
            self.value_dense.build((None, None, channels))
        self.dropout_layer = keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy, name="dropout"
        )

    def call(self, inputs, mask=None, training=None, return_attention_maps=False):
        self._check_input_shape(inputs.shape)
        time, height, width = self._grid(inputs)
        channels = inputs.shape[-1]
        positions = height * width
        # (frames, height * width, channels): the frames of a video join the batch.
        x = ops.reshape(inputs, (-1, positions, channels))
        if mask is not None:
            mask = ops.reshape(ops.cast(mask, "bool"), (-1, positions, 1))
            x = ops.where(mask, x, ops.zeros_like(x))

        if mask is None and not return_attention_maps:
            tokens = self._fused_tokens(x, height, width, training)
            if tokens is not None:
                return self._finish(tokens, time)
        logits = self._attention_logits(x, mask, height, width, training)
        # Sums over many positions, so at least float32.
        wide = keras.backend.standardize_dtype(logits.dtype) == "float64"
        logits = ops.cast(logits, "float64" if wide else "float32")
        if self.activation == "sigmoid":
            maps = ops.sigmoid(logits)
        else:
            if mask is not None:
                lowest = ops.full_like(logits, -1e9)
                logits = ops.where(mask, logits, lowest)
            maps = ops.softmax(logits, axis=1)
        if mask is not None:
            maps = maps * ops.cast(mask, maps.dtype)

        weights = maps
        if self.pooling == "mean":
            if mask is None:
                count = ops.cast(positions, maps.dtype)
            else:
                count = ops.sum(ops.cast(mask, maps.dtype), axis=1, keepdims=True)
                count = ops.maximum(count, 1.0)
            weights = maps / count
        # The value map is linear, so that it may as well follow the pooling, where it
        # has few tokens to map instead of all positions.
        values = x
        if self.value_dim is not None and is_literal():
            values = self.value_dense(x)
        tokens = ops.einsum("bps,bpc->bsc", ops.cast(weights, values.dtype), values)
        tokens = self._finish(tokens, time, is_mapped=is_literal())
        if not return_attention_maps:
            return tokens
        maps = ops.cast(ops.transpose(maps, (0, 2, 1)), self.compute_dtype)
        maps_shape = (self.num_tokens, height, width)
        if len(inputs.shape) == 5:
            maps_shape = (time, *maps_shape)
        return tokens, ops.reshape(maps, (-1, *maps_shape))

    def _finish(self, tokens, time, is_mapped=False):
        """Maps the tokens of frames, and brings those of a video together."""
        if self.value_dim is not None and not is_mapped:
            tokens = self.value_dense(tokens)
        return ops.reshape(tokens, (-1, time * self.num_tokens, tokens.shape[-1]))

    def _fused_tokens(self, x, height, width, training):
        """Tokens by one kernel, before `value_dense`, or `None` where it cannot."""
        if (
            keras.backend.backend() != "jax"
            or is_literal()
            or self.attention != "conv"
            or self.num_convs > 1
            or self.activation != "sigmoid"
            or self.use_norm
            or self.use_bias
            or (training and self.dropout > 0)
            or not (isinstance(height, int) and isinstance(width, int))
        ):
            return None
        from tokenlearner_keras.ops import _fused_tokens

        divisor = height * width if self.pooling == "mean" else 1
        kernel = ops.cast(self.attention_layers[0].kernel, self.compute_dtype)
        x = ops.cast(x, self.compute_dtype)
        return _fused_tokens.tokens(x, kernel, height, width, float(divisor))

    def compute_mask(self, inputs, previous_mask=None):
        # The tokens are all valid, whatever was masked in the input.
        return None

    def compute_output_shape(self, input_shape):
        self._check_input_shape(input_shape)
        channels = input_shape[-1] if self.value_dim is None else self.value_dim
        num_tokens = self.num_tokens
        if len(input_shape) == 5:
            time = input_shape[1]
            num_tokens = None if time is None else time * num_tokens
        return (input_shape[0], num_tokens, channels)

    def compute_output_spec(
        self, inputs, mask=None, training=None, return_attention_maps=False
    ):
        tokens = keras.KerasTensor(
            self.compute_output_shape(inputs.shape), dtype=self.compute_dtype
        )
        if not return_attention_maps:
            return tokens
        if len(inputs.shape) == 3:
            height, width = resolve_grid(self, inputs.shape[1], self.grid_shape)
        else:
            height, width = inputs.shape[-3:-1]
        shape = (self.num_tokens, height, width)
        if len(inputs.shape) == 5:
            shape = (inputs.shape[1], *shape)
        maps = keras.KerasTensor((inputs.shape[0], *shape), dtype=self.compute_dtype)
        return tokens, maps

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "num_tokens": self.num_tokens,
                "attention": self.attention,
                "num_convs": self.num_convs,
                "kernel_size": self.kernel_size,
                "bottleneck_dim": self.bottleneck_dim,
                "activation": self.activation,
                "pooling": self.pooling,
                "use_norm": self.use_norm,
                "use_bias": self.use_bias,
                "value_dim": self.value_dim,
                "dropout": self.dropout,
                "grid_shape": self.grid_shape,
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

    def _sublayer_arguments(self, use_bias=True):
        arguments = {
            "kernel_initializer": clone_initializer(self.kernel_initializer),
            "kernel_regularizer": self.kernel_regularizer,
            "dtype": self.dtype_policy,
        }
        if use_bias:
            arguments["bias_initializer"] = clone_initializer(self.bias_initializer)
            arguments["bias_regularizer"] = self.bias_regularizer
        return arguments

    def _attention_logits(self, x, mask, height, width, training):
        """Returns the logits, `(frames, height * width, num_tokens)`, of `x`."""
        if self.use_norm:
            x = self.norm(x)
        for index, layer in enumerate(self.attention_layers):
            if index > 0:
                x = self.dropout_layer(gelu(x), training=training)
            if self.attention == "mlp":
                x = layer(x)
                continue
            if mask is not None:
                # A convolution would carry what stands in masked positions to others.
                x = ops.where(mask, x, ops.zeros_like(x))
            x = _convolve(layer, ops.reshape(x, (-1, height, width, x.shape[-1])))
            x = ops.reshape(x, (-1, height * width, self.num_tokens))
        return self.dropout_layer(x, training=training)

    def _grid(self, inputs):
        """Returns time, height and width; tensors where the shape is unknown."""
        shape = ops.shape(inputs)
        if len(shape) == 3:
            return 1, *resolve_grid(self, inputs.shape[1], self.grid_shape)
        if len(shape) == 4:
            return 1, shape[1], shape[2]
        return shape[1:4]

    def _check_input_shape(self, input_shape):
        if len(input_shape) not in (3, 4, 5):
            raise ValueError(
                f"The input of layer '{self.name}' must have rank 4 (batch, height, "
                "width, channels), rank 3 (batch, height * width, channels) or rank 5 "
                "(batch, time, height, width, channels). "
                f"Received: input_shape={tuple(input_shape)}"
            )
        check_channels(self, input_shape)
        if len(input_shape) == 3:
            height, width = resolve_grid(self, input_shape[1], self.grid_shape)
        else:
            height, width = input_shape[-3:-1]
            if self.grid_shape not in (None, (height, width)) and None not in (
                height,
                width,
            ):
                raise ValueError(
                    f"`grid_shape` of layer '{self.name}' must equal the height and "
                    f"width of its input. Received: grid_shape={self.grid_shape} for "
                    f"input_shape={tuple(input_shape)}"
                )
        if (
            height is not None
            and width is not None
            and self.num_tokens > height * width
        ):
            raise ValueError(
                f"Argument `num_tokens` of layer '{self.name}' must be at most the "
                f"number of positions. Received: num_tokens={self.num_tokens} for "
                f"{height} x {width} = {height * width} positions"
            )


def _convolve(layer, x):
    """Applies a convolution of many channels to few tokens.

    A matrix product gives what each tap of the kernel adds, and shifts of these few
    channels are summed. On a CPU, XLA would copy the input in another order for the
    kernel's gradient; on a GPU, a convolution of so few filters is slow.
    """
    channels, size, filters = x.shape[-1], layer.kernel_size[0], layer.filters
    dtype = layer.compute_dtype
    wide = keras.backend.result_type(dtype, "float32")
    if channels < size * size * filters or not (
        on_gpu() or (compiled_for_cpu() and dtype == wide)
    ):
        return layer(x)
    kernel = ops.reshape(
        ops.transpose(ops.cast(layer.kernel, dtype), (2, 0, 1, 3)), (channels, -1)
    )
    taps = ops.matmul(ops.cast(x, dtype), kernel)
    total = sum_taps(taps, size, filters, wide)
    if layer.use_bias:
        total = total + ops.cast(layer.bias, wide)
    return ops.cast(total, dtype)
