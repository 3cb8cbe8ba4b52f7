import keras
from keras import ops

from tokenlearner_keras.layers._forms import compiled_for_cpu
from tokenlearner_keras.ops._backend import with_gradient


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class LayerNormalization(keras.layers.LayerNormalization):
    """`keras.layers.LayerNormalization`, quicker where XLA compiles it for a CPU.

    XLA adds the channels of a position one after another there, and differentiates
    through all of it. So the means become matrix products with a vector, and the
    gradient its closed form. Elsewhere Keras's own form is kept: a GPU or a TPU may
    round the factors of a product, and exported files hold what converters know.
    """

    def call(self, inputs):
        by_products = (
            compiled_for_cpu()
            and list(self.axis) in ([-1], [len(inputs.shape) - 1])
            and self.gamma is not None
            and self.beta is not None
            and not self.rms_scaling
        )
        if not by_products:
            return super().call(inputs)
        wide = keras.backend.result_type(inputs.dtype, "float32")
        outputs = normalize_by_products(
            ops.cast(inputs, wide),
            ops.cast(self.gamma, wide),
            ops.cast(self.beta, wide),
            self.epsilon,
        )
        return ops.cast(outputs, self.compute_dtype)


def normalize_by_products(x, gamma, beta, epsilon):
    """Layer normalisation over the last axis, with means that are matrix products."""
    channels = x.shape[-1]

    def forward(x, gamma, beta):
        average = ops.full((channels, 1), 1 / channels, dtype=x.dtype)
        mean = ops.matmul(x, average)
        variance = ops.matmul(ops.square(x - mean), average)
        inverse = ops.rsqrt(variance + epsilon)
        return (x - mean) * (inverse * gamma) + beta, (mean, inverse)

    def backward(args, residuals, upstream):
        x, gamma, _ = args
        mean, inverse = residuals
        normal = (x - mean) * inverse
        product = upstream * normal
        weights = ops.reshape(gamma, (-1, 1)) / channels
        slope = inverse * (
            upstream * gamma
            - ops.matmul(upstream, weights)
            - normal * ops.matmul(product, weights)
        )
        return slope, ops.sum(product, axis=0), ops.sum(upstream, axis=0)

    rows = ops.reshape(x, (-1, channels))
    outputs = with_gradient(forward, backward)(rows, gamma, beta)
    return ops.reshape(outputs, ops.shape(x))
