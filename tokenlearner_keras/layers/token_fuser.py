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
from tokenlearner_keras.layers._layer_normalization import LayerNormalization
from tokenlearner_keras.layers.activations import gelu

MODES = ("broadcast", "attention")


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class TokenFuser(keras.layers.Layer):
    """Fuses learned tokens and writes them back to the tensor they came from.

    `mode="broadcast"` is the paper's TokenFuser (section 3.2, equation 3): one linear
    map from all tokens of a clip to one vector a frame, shared by the channels, whose
    result is broadcast to every pixel:

    `outputs[t, h, w, c] = inputs[t, h, w, c] + sum_i kernel[i, t] * tokens[i, c]`

    `mode="attention"` is the fuser of the authors' later code. The tokens of each frame
    are mixed by a linear map over the tokens between two layer normalizations, and
    every pixel takes a weighted sum of them; the weights are sigmoids of an MLP of the
    normalised pixel.

    Args:
        mode: `"broadcast"` or `"attention"`.
        residual: bool. Whether `inputs` is added to the result.
        bottleneck_dim: int. Hidden channels of the MLP (`mode="attention"`).
        use_norm: bool. Whether the mix of tokens stands between two layer
            normalizations (`mode="attention"`).
        use_bias: bool or `None`. Whether the linear maps have biases. `None` follows
            the source: no biases in `"broadcast"`, biases in `"attention"`.
        dropout: float. Dropout rate of the MLP and of the result.
        kernel_initializer: Initializer of the kernels. In `mode="attention"` the mix
            of tokens starts at zero, as the authors' code does.
        bias_initializer: Initializer of the biases.
        kernel_regularizer: Regularizer of all kernels.
        bias_regularizer: Regularizer of the biases.
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: List of two tensors: the tokens, `(batch, time * num_tokens, channels)`,
            frame-major as `TokenLearner` returns them, and the tensor that they were
            learned from, `(batch, time, height, width, channels)`,
            `(batch, height, width, channels)` or `(batch, positions, channels)`. The
            last two count as one frame.
        training: bool. Whether dropout is active.

    Output:
        Tensor with the shape of the second input.

    Raises:
        ValueError: at construction for an argument out of range; at build for ranks or
            channels that do not fit, an unknown number of tokens or frames, or a number
            of tokens that is no multiple of the number of frames.
    """

    def __init__(
        self,
        mode="broadcast",
        residual=True,
        bottleneck_dim=64,
        use_norm=True,
        use_bias=None,
        dropout=0.0,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.mode = check_choice("mode", mode, MODES)
        self.residual = bool(residual)
        self.bottleneck_dim = check_positive_int("bottleneck_dim", bottleneck_dim)
        self.use_norm = bool(use_norm)
        self.use_bias = use_bias
        self.dropout = check_rate("dropout", dropout)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)

    def build(self, input_shape):
        tokens_shape, inputs_shape = self._check_input_shape(input_shape)
        num_tokens, channels = tokens_shape[1:]
        time = _time(inputs_shape)
        use_bias = self.mode == "attention" if self.use_bias is None else self.use_bias
        common = {
            "bias_initializer": clone_initializer(self.bias_initializer),
            "kernel_regularizer": self.kernel_regularizer,
            "bias_regularizer": self.bias_regularizer,
            "dtype": self.dtype_policy,
        }
        if self.mode == "broadcast":
            self.fuse_dense = keras.layers.EinsumDense(
                "bic,it->btc",
                output_shape=(time, channels),
                # A bias is one number a frame, shared by the channels as the kernel.
                bias_axes="t" if use_bias else None,
                kernel_initializer=clone_initializer(self.kernel_initializer),
                name="fuse",
                **common,
            )
            self.fuse_dense.build(tokens_shape)
        else:
            tokens_per_frame = num_tokens // time
            frame_shape = (None, tokens_per_frame, channels)
            if self.use_norm:
                self.mix_norms = [
                    LayerNormalization(
                        epsilon=1e-6, name=f"mix_norm_{index}", dtype=self.dtype_policy
                    )
                    for index in range(2)
                ]
                for norm in self.mix_norms:
                    norm.build(frame_shape)
            self.mix_dense = keras.layers.Dense(
                tokens_per_frame,
                use_bias=use_bias,
                kernel_initializer="zeros",
                name="mix",
                **common,
            )
            self.mix_dense.build((None, channels, tokens_per_frame))
            self.inputs_norm = LayerNormalization(
                epsilon=1e-6, name="inputs_norm", dtype=self.dtype_policy
            )
            self.inputs_norm.build((None, None, channels))
            self.attention_layers = []
            width = channels
            for index, units in enumerate((self.bottleneck_dim, tokens_per_frame)):
                layer = keras.layers.Dense(
                    units,
                    use_bias=use_bias,
                    kernel_initializer=clone_initializer(self.kernel_initializer),
                    name=f"dense_{index}",
                    **common,
                )
                layer.build((None, None, width))
                self.attention_layers.append(layer)
                width = units
        self.dropout_layer = keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy, name="dropout"
        )

    def call(self, inputs, training=None):
        tokens, x = inputs
        self._check_input_shape((tokens.shape, x.shape))
        if self.mode == "broadcast":
            fused = self.dropout_layer(self.fuse_dense(tokens), training=training)
            if self.residual:
                outputs = _add_in_one_kernel(x, fused)
                if outputs is not None:
                    return outputs
            # One vector a frame, broadcast over the positions of that frame.
            if len(x.shape) == 5:
                fused = fused[:, :, None, None]
            elif len(x.shape) == 4:
                fused = fused[:, :, None]
            if self.residual:
                return x + fused
            return ops.broadcast_to(fused, ops.shape(x))
        fused = self._fuse_by_attention(tokens, x, training)
        fused = self.dropout_layer(fused, training=training)
        return x + fused if self.residual else fused

    def compute_output_shape(self, input_shape):
        return tuple(self._check_input_shape(input_shape)[1])

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "mode": self.mode,
                "residual": self.residual,
                "bottleneck_dim": self.bottleneck_dim,
                "use_norm": self.use_norm,
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

    def _fuse_by_attention(self, tokens, x, training):
        channels = x.shape[-1]
        tokens_per_frame = self.mix_dense.units
        # The frames join the batch.
        tokens = ops.reshape(tokens, (-1, tokens_per_frame, channels))
        frames = x
        if len(x.shape) > 3:
            shape = ops.shape(x)
            frames = ops.reshape(x, (-1, shape[-3] * shape[-2], channels))
        if self.use_norm:
            tokens = self.mix_norms[0](tokens)
        tokens = ops.transpose(tokens, (0, 2, 1))
        tokens = ops.transpose(self.mix_dense(tokens), (0, 2, 1))
        if self.use_norm:
            tokens = self.mix_norms[1](tokens)
        hidden, logits = self.attention_layers
        weights = self.dropout_layer(
            gelu(hidden(self.inputs_norm(frames))), training=training
        )
        weights = ops.sigmoid(self.dropout_layer(logits(weights), training=training))
        return ops.reshape(ops.matmul(weights, tokens), ops.shape(x))

    def _check_input_shape(self, input_shape):
        try:
            tokens_shape, inputs_shape = (tuple(shape) for shape in input_shape)
        except (TypeError, ValueError):
            raise ValueError(
                f"Layer '{self.name}' must be called on a list of two tensors, "
                f"[tokens, inputs]. Received: input_shape={input_shape}"
            ) from None
        if len(tokens_shape) != 3 or len(inputs_shape) not in (3, 4, 5):
            raise ValueError(
                f"Layer '{self.name}' expects tokens of rank 3 (batch, time * "
                "num_tokens, channels) and inputs of rank 3, 4 or 5 (batch, [time, "
                "height, width,] channels). Received: tokens of shape "
                f"{tokens_shape}, inputs of shape {inputs_shape}"
            )
        if check_channels(self, tokens_shape) != inputs_shape[-1]:
            raise ValueError(
                f"The tokens and the inputs of layer '{self.name}' must have the same "
                f"channels. Received: tokens of shape {tokens_shape}, inputs of shape "
                f"{inputs_shape}"
            )
        num_tokens, time = tokens_shape[1], _time(inputs_shape)
        if num_tokens is None or time is None:
            raise ValueError(
                f"Layer '{self.name}' needs a known number of tokens and frames: its "
                "weights depend on them. Received: tokens of shape "
                f"{tokens_shape}, inputs of shape {inputs_shape}"
            )
        if num_tokens % time:
            raise ValueError(
                f"The number of tokens of layer '{self.name}' must be a multiple of "
                f"its number of frames. Received: {num_tokens} tokens for {time} "
                f"frames (tokens of shape {tokens_shape}, inputs of shape "
                f"{inputs_shape})"
            )
        if self.built:
            self._check_built_for(num_tokens, time)
        return tokens_shape, inputs_shape

    def _check_built_for(self, num_tokens, time):
        if self.mode == "broadcast":
            expected, received = self.fuse_dense.kernel.shape, (num_tokens, time)
        else:
            expected, received = (self.mix_dense.units, 1), (num_tokens // time, 1)
        if tuple(expected) != tuple(received):
            raise ValueError(
                f"Layer '{self.name}' was built for {expected[0]} tokens and "
                f"{expected[1]} frame(s) at a time. Received: {received[0]} tokens and "
                f"{received[1]} frame(s)"
            )


def _time(inputs_shape):
    return inputs_shape[1] if len(inputs_shape) == 5 else 1


def _add_in_one_kernel(x, vectors):
    """Adds the vector of each frame to its positions, or `None` where it cannot.

    So that the gradient, a sum over the positions, is a kernel.
    """
    if keras.backend.backend() != "jax" or is_literal():
        return None
    from tokenlearner_keras.ops import _fused_tokens

    return _fused_tokens.add_to_positions(x, vectors)
