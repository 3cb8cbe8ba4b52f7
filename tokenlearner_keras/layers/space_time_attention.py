import keras
from keras import ops

from tokenlearner_keras.layers._checks import check_choice
from tokenlearner_keras.layers.frame_conv2d import check_video_shape

OVER = ("space_time", "space", "time")


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class SpaceTimeAttention(keras.layers.Layer):
    """Applies an attention layer to a video: jointly, within frames or over time.

    The three ways of Tables 4 and 5 of
    [TokenLearner](https://arxiv.org/abs/2106.11297v1) to attend without learned tokens.

    Args:
        attention: Layer from `(batch, positions, channels)` to
            `(batch, positions, channels_out)`, such as `MultiHeadSelfAttention` or
            `VectorAttention`.
        over: `"space_time"` (every pixel of every frame attends to all of them),
            `"space"` (the pixels of each frame) or `"time"` (the frames, at each
            pixel).
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: Tensor of shape `(batch, time, height, width, channels)`.
        training: bool. Passed to `attention` if it takes it.

    Output:
        Tensor of shape `(batch, time, height, width, channels_out)`.

    Raises:
        ValueError: at construction for an unknown `over` or something that is no layer;
            at build for an input of another rank or unknown channels.
    """

    def __init__(self, attention, over="space_time", **kwargs):
        super().__init__(**kwargs)
        if not isinstance(attention, keras.layers.Layer):
            raise ValueError(
                "Argument `attention` must be a Keras layer. "
                f"Received: attention={attention!r}"
            )
        self.attention = attention
        self.over = check_choice("over", over, OVER)

    def build(self, input_shape):
        check_video_shape(self, input_shape)
        if not self.attention.built:
            self.attention.build(self._sequence_shape(input_shape))
            self.attention.built = True

    def call(self, inputs, training=None):
        _, time, height, width, channels = ops.shape(inputs)
        x = inputs
        if self.over == "space_time":
            x = ops.reshape(x, (-1, time * height * width, channels))
        elif self.over == "space":
            x = ops.reshape(x, (-1, height * width, channels))
        else:
            x = ops.transpose(x, (0, 2, 3, 1, 4))
            x = ops.reshape(x, (-1, time, channels))
        if self.attention._call_has_training_arg:
            x = self.attention(x, training=training)
        else:
            x = self.attention(x)
        if self.over == "time":
            x = ops.reshape(x, (-1, height, width, time, x.shape[-1]))
            return ops.transpose(x, (0, 3, 1, 2, 4))
        return ops.reshape(x, (-1, time, height, width, x.shape[-1]))

    def compute_output_shape(self, input_shape):
        check_video_shape(self, input_shape)
        shape = self.attention.compute_output_shape(self._sequence_shape(input_shape))
        return (*input_shape[:-1], shape[-1])

    def get_config(self):
        config = super().get_config()
        attention = keras.saving.serialize_keras_object(self.attention)
        # It is built with this layer.
        attention.pop("build_config", None)
        config.update({"attention": attention, "over": self.over})
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        config["attention"] = keras.saving.deserialize_keras_object(config["attention"])
        return cls(**config)

    def _sequence_shape(self, input_shape):
        _, time, height, width, channels = input_shape
        sizes = {
            "space_time": (time, height, width),
            "space": (height, width),
            "time": (time,),
        }[self.over]
        positions = 1
        for size in sizes:
            positions = None if None in (positions, size) else positions * size
        return (None, positions, channels)
