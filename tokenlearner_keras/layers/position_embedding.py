import keras

from tokenlearner_keras.layers._checks import check_channels
from tokenlearner_keras.layers._initializers import clone_initializer


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class PositionEmbedding(keras.layers.Layer):
    """Adds a learned vector to every position of a sequence.

    Args:
        initializer: Initializer of the embeddings. `None` is ViT's: a normal
            distribution with standard deviation 0.02.
        regularizer: Regularizer of the embeddings.
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: Tensor of shape `(batch, positions, channels)`.

    Output:
        Tensor with the shape of `inputs`.

    Raises:
        ValueError: at build for an input that is not of rank 3, or whose positions or
            channels are unknown.
    """

    def __init__(self, initializer=None, regularizer=None, **kwargs):
        super().__init__(**kwargs)
        if initializer is None:
            initializer = keras.initializers.RandomNormal(stddev=0.02)
        self.initializer = keras.initializers.get(initializer)
        self.regularizer = keras.regularizers.get(regularizer)
        self.supports_masking = True

    def build(self, input_shape):
        if len(input_shape) != 3 or input_shape[1] is None:
            raise ValueError(
                f"The input of layer '{self.name}' must have rank 3 (batch, positions, "
                "channels) and a known number of positions: each has its weights. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        channels = check_channels(self, input_shape)
        self.embeddings = self.add_weight(
            shape=(1, input_shape[1], channels),
            initializer=clone_initializer(self.initializer),
            regularizer=self.regularizer,
            name="embeddings",
        )

    def call(self, inputs):
        return inputs + self.embeddings

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "initializer": keras.initializers.serialize(self.initializer),
                "regularizer": keras.regularizers.serialize(self.regularizer),
            }
        )
        return config
