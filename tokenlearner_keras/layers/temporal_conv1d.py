import keras
from keras import ops

from tokenlearner_keras.layers._checks import check_positive_int
from tokenlearner_keras.layers._forms import is_literal
from tokenlearner_keras.layers.frame_conv2d import (
    check_video_shape,
    convolution_config,
    convolve,
    make_convolution,
)


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class TemporalConv1D(keras.layers.Layer):
    """Convolves a video in time at every pixel: the 1-D part of a (2+1)-D pair.

    It runs as a 2-D convolution over (time, height * width) with a kernel of one pixel,
    so that nothing is transposed. "Same" padding.

    Args:
        filters: int or `None`. Output channels. `None`, and a depthwise convolution,
            keep the channels of the input.
        kernel_size: int. Length of the kernel in frames.
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
        Tensor of shape `(batch, time, height, width, filters)`.

    Raises:
        ValueError: at construction for an argument out of range; at build for an input
            of another rank or unknown channels.
    """

    def __init__(
        self,
        filters=None,
        kernel_size=3,
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
        self.depthwise = bool(depthwise)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)

    def build(self, input_shape):
        check_video_shape(self, input_shape)
        self.convolution = make_convolution(
            self, input_shape[-1], (self.kernel_size, 1), 1
        )
        self.convolution.build((None, None, None, input_shape[-1]))

    def call(self, inputs):
        shape = ops.shape(inputs)
        _, time, height, width, channels = shape
        x = ops.reshape(inputs, (-1, time, height * width, channels))
        if self.depthwise and not is_literal():
            x = self._weighted_shifts(x)
        else:
            x = convolve(self.convolution, x)
        return ops.reshape(x, (-1, time, height, width, x.shape[-1]))

    def _weighted_shifts(self, x):
        """The depthwise convolution as a sum of shifted clips.

        It is bound by memory, and compilers make one pass of this, while a grouped
        convolution is slow where the groups have one channel.
        """
        wide = "float64" if self.compute_dtype == "float64" else "float32"
        kernel = ops.cast(self.convolution.kernel, wide)
        before = (self.kernel_size - 1) // 2
        time, after = ops.shape(x)[1], self.kernel_size - 1 - before
        padded = ops.pad(x, ((0, 0), (before, after), (0, 0), (0, 0)))
        total = 0.0
        for step in range(self.kernel_size):
            shifted = ops.cast(padded[:, step : step + time], wide)
            total = total + shifted * kernel[step, 0, :, 0]
        if self.use_bias:
            total = total + ops.cast(self.convolution.bias, wide)
        return ops.cast(total, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        check_video_shape(self, input_shape)
        channels = input_shape[-1] if self.depthwise else self.filters
        return (*input_shape[:-1], channels or input_shape[-1])

    def get_config(self):
        config = super().get_config()
        config.update(convolution_config(self))
        return config
