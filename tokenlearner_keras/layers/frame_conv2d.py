import keras
from keras import ops

from tokenlearner_keras.layers._checks import check_channels, check_positive_int
from tokenlearner_keras.layers._forms import on_gpu
from tokenlearner_keras.layers._initializers import clone_initializer

# Tensor cores take the channels of half precision numbers by as many.
CHANNEL_MULTIPLE = 8


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class FrameConv2D(keras.layers.Layer):
    """Convolves every frame of a video in space: the 2-D part of a (2+1)-D pair.

    The frames join the batch of one `Conv2D` (or `DepthwiseConv2D`), which backends run
    faster than a 3-D convolution with a kernel of one frame. "Same" padding.

    Args:
        filters: int or `None`. Output channels. `None`, and a depthwise convolution,
            keep the channels of the input.
        kernel_size: int. Height and width of the kernel.
        strides: int. Stride in height and width.
        depthwise: bool. Whether every channel is convolved on its own.
        use_bias: bool. Whether the convolution has a bias.
        kernel_initializer: Initializer of the kernel.
        bias_initializer: Initializer of the bias.
        kernel_regularizer: Regularizer of the kernel.
        bias_regularizer: Regularizer of the bias.
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: Tensor of shape `(batch, time, height, width, channels)`.

    Output:
        Tensor of shape `(batch, time, ceil(height / strides), ceil(width / strides),
        filters)`.

    Raises:
        ValueError: at construction for an argument out of range; at build for an input
            of another rank or unknown channels.
    """

    def __init__(
        self,
        filters=None,
        kernel_size=3,
        strides=1,
        depthwise=False,
        use_bias=False,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.filters = (
            None if filters is None else check_positive_int("filters", filters)
        )
        self.kernel_size = check_positive_int("kernel_size", kernel_size)
        self.strides = check_positive_int("strides", strides)
        self.depthwise = bool(depthwise)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)

    def build(self, input_shape):
        check_video_shape(self, input_shape)
        self.convolution = make_convolution(
            self, input_shape[-1], self._kernel_shape(), self.strides
        )
        self.convolution.build((None, None, None, input_shape[-1]))

    def call(self, inputs):
        shape = ops.shape(inputs)
        x = ops.reshape(inputs, (-1, *shape[2:]))
        x = convolve(self.convolution, x)
        return ops.reshape(x, (-1, shape[1], *ops.shape(x)[1:]))

    def compute_output_shape(self, input_shape):
        check_video_shape(self, input_shape)
        sizes = [
            None if size is None else -(-size // self.strides)
            for size in input_shape[2:4]
        ]
        channels = input_shape[-1] if self.depthwise else self.filters
        return (*input_shape[:2], *sizes, channels or input_shape[-1])

    def get_config(self):
        config = super().get_config()
        config.update({"strides": self.strides, **convolution_config(self)})
        return config

    def _kernel_shape(self):
        return (self.kernel_size, self.kernel_size)


def make_convolution(layer, channels, kernel_shape, strides):
    """Returns the 2-D convolution, full or depthwise, that `layer` describes."""
    name = "kernel" if not layer.depthwise else "depthwise"
    arguments = {
        f"{name}_initializer": clone_initializer(layer.kernel_initializer),
        f"{name}_regularizer": layer.kernel_regularizer,
        "bias_initializer": clone_initializer(layer.bias_initializer),
        "bias_regularizer": layer.bias_regularizer,
        "use_bias": layer.use_bias,
        "strides": strides,
        "padding": "same",
        "data_format": "channels_last",
        "dtype": layer.dtype_policy,
        "name": "convolution",
    }
    if not layer.depthwise:
        filters = layer.filters or channels
        return keras.layers.Conv2D(filters, kernel_shape, **arguments)
    if layer.filters not in (None, channels):
        raise ValueError(
            f"Argument `filters` of layer '{layer.name}' must be the channels of its "
            "input, or None, for a depthwise convolution. Received: "
            f"filters={layer.filters} for an input of {channels} channels"
        )
    return keras.layers.DepthwiseConv2D(kernel_shape, **arguments)


def convolve(convolution, x):
    """Applies a 2-D convolution, with the channels that tensor cores take on a GPU."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    channels, filters = x.shape[-1], getattr(convolution, "filters", None)
    if (
        filters is None
        or channels < CHANNEL_MULTIPLE
        or channels % CHANNEL_MULTIPLE == filters % CHANNEL_MULTIPLE == 0
        or dtype not in ("bfloat16", "float16")
        or not on_gpu()
    ):
        return convolution(x)
    # Padded here, the zeros are written together with what comes before. Otherwise
    # cuDNN pads images, gradients and kernels in passes of their own.
    more_channels, more_filters = (-n % CHANNEL_MULTIPLE for n in (channels, filters))
    x = ops.pad(x, ((0, 0), (0, 0), (0, 0), (0, more_channels)))
    kernel = ops.pad(
        ops.cast(convolution.kernel, dtype),
        ((0, 0), (0, 0), (0, more_channels), (0, more_filters)),
    )
    x = ops.conv(x, kernel, convolution.strides, "same", data_format="channels_last")[
        ..., :filters
    ]
    if convolution.use_bias:
        x = x + ops.cast(convolution.bias, dtype)
    return x


def convolution_config(layer):
    """The arguments that both parts of a (2+1)-D pair have."""
    return {
        "filters": layer.filters,
        "kernel_size": layer.kernel_size,
        "depthwise": layer.depthwise,
        "use_bias": layer.use_bias,
        "kernel_initializer": keras.initializers.serialize(layer.kernel_initializer),
        "bias_initializer": keras.initializers.serialize(layer.bias_initializer),
        "kernel_regularizer": keras.regularizers.serialize(layer.kernel_regularizer),
        "bias_regularizer": keras.regularizers.serialize(layer.bias_regularizer),
    }


def check_video_shape(layer, input_shape):
    """Raises `ValueError` unless the shape is a video's, of known channels."""
    if len(input_shape) != 5:
        raise ValueError(
            f"The input of layer '{layer.name}' must have rank 5 (batch, time, height, "
            f"width, channels). Received: input_shape={tuple(input_shape)}"
        )
    check_channels(layer, input_shape)
