import keras
from keras import ops

from tokenlearner_keras.layers._checks import check_channels
from tokenlearner_keras.layers._initializers import clone_initializer


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class ClassToken(keras.layers.Layer):
    """Puts a learned token before a sequence.

    Args:
        initializer: Initializer of the token.
        regularizer: Regularizer of the token.
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: Tensor of shape `(batch, positions, channels)`.
        mask: Optional boolean tensor of shape `(batch, positions)`, passed on with the
            new token as valid.

    Output:
        Tensor of shape `(batch, 1 + positions, channels)`.

    Raises:
        ValueError: at build for an input that is not of rank 3 or has unknown channels.
    """

    def __init__(self, initializer="zeros", regularizer=None, **kwargs):
        super().__init__(**kwargs)
        self.initializer = keras.initializers.get(initializer)
        self.regularizer = keras.regularizers.get(regularizer)
        self.supports_masking = True

    def build(self, input_shape):
        if len(input_shape) != 3:
            raise ValueError(
                f"The input of layer '{self.name}' must have rank 3 (batch, positions, "
                f"channels). Received: input_shape={tuple(input_shape)}"
            )
        self.token = self.add_weight(
            shape=(1, 1, check_channels(self, input_shape)),
            initializer=clone_initializer(self.initializer),
            regularizer=self.regularizer,
            name="token",
        )

    def call(self, inputs):
        shape = (ops.shape(inputs)[0], 1, inputs.shape[-1])
        token = ops.broadcast_to(ops.cast(self.token, inputs.dtype), shape)
        return ops.concatenate([token, inputs], axis=1)

    def compute_mask(self, inputs, previous_mask=None):
        if previous_mask is None:
            return None
        return ops.pad(previous_mask, ((0, 0), (1, 0)), constant_values=True)

    def compute_output_shape(self, input_shape):
        batch, positions, channels = input_shape
        return (batch, None if positions is None else positions + 1, channels)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "initializer": keras.initializers.serialize(self.initializer),
                "regularizer": keras.regularizers.serialize(self.regularizer),
            }
        )
        return config
