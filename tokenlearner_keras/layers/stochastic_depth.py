import keras

from tokenlearner_keras.layers._checks import check_rate


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class StochasticDepth(keras.layers.Layer):
    """Drops a residual branch, example by example, while training.

    With probability `rate` all values of an example become zero; what is kept is scaled
    by `1 / (1 - rate)`, so that the expected value stays. Put it on the branch, before
    the addition: `x + StochasticDepth(0.1)(branch(x))`.
    [Deep Networks with Stochastic Depth](https://arxiv.org/abs/1603.09382).

    Args:
        rate: float in [0, 1). Probability that an example's branch is dropped.
        seed: int or `None`. Random seed.
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: Tensor of shape `(batch, ...)`, of any rank.
        training: bool. Whether branches are dropped; otherwise `inputs` is returned.

    Output:
        Tensor with the shape of `inputs`.

    Raises:
        ValueError: at construction if `rate` is not in [0, 1).
    """

    def __init__(self, rate=0.0, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.rate = check_rate("rate", rate)
        self.seed = seed
        if self.rate > 0:
            self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True
        self.built = True

    def call(self, inputs, training=False):
        if not training or self.rate == 0:
            return inputs
        # One draw an example: the other axes of the noise have size 1.
        noise_shape = (None,) + (1,) * (len(inputs.shape) - 1)
        return keras.random.dropout(
            inputs, self.rate, noise_shape=noise_shape, seed=self.seed_generator
        )

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        config = super().get_config()
        config.update({"rate": self.rate, "seed": self.seed})
        return config
