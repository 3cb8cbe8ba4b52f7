import functools

import keras
from keras import ops

from tokenlearner_keras.ops._backend import with_gradient


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` with fewer passes over its input in training.

    Both moments come from one pass, and the gradient is its closed form, with one more.
    Where a batch is spread over devices on the JAX backend, each pass is a sum over
    them; Keras's own form has four of those, one after the other, this one two.
    """

    def call(self, inputs, training=None, mask=None):
        if (
            not training
            or not self.trainable
            or mask is not None
            or self.renorm
            or self.synchronized
            or not (self.center and self.scale)
        ):
            return super().call(inputs, training=training, mask=mask)
        rank = len(inputs.shape)
        axes = [axis for axis in range(rank) if axis != self.axis % rank]
        moving = self.moving_mean, self.moving_variance
        # Copies: a gradient function must not meet variables. The moving mean is close
        # to the mean, so that the variance is no difference of large numbers.
        gamma, beta, shift = map(ops.copy, (self.gamma, self.beta, self.moving_mean))
        shift = ops.stop_gradient(shift)
        outputs = normalize_batch(
            inputs, gamma, beta, shift, axes, self.epsilon, self.compute_dtype
        )
        # The compiler finds that these are computed already.
        results = moments(ops.stop_gradient(inputs), shift, axes)
        for variable, result in zip(moving, results):
            result = ops.reshape(ops.cast(result, variable.dtype), variable.shape)
            variable.assign(variable * self.momentum + result * (1.0 - self.momentum))
        return outputs


def moments(x, shift, axes):
    """Returns mean and variance over `axes`, which stay with size one.

    Args:
        x: float tensor.
        shift: float tensor of shape `(channels,)`, close to the mean.
        axes: All axes but that of the channels.
    """
    dtype = keras.backend.result_type(x.dtype, "float32")
    shift = _beside(shift, x, axes, dtype)
    x = ops.cast(x, dtype) - shift
    mean = ops.mean(x, axis=axes, keepdims=True)
    variance = ops.mean(x * x, axis=axes, keepdims=True) - mean * mean
    return mean + shift, ops.maximum(variance, 0.0)


def normalize_batch(x, gamma, beta, shift, axes, epsilon, dtype):
    """Returns `x` normalised by its moments over `axes`, times `gamma` plus `beta`."""
    wide = keras.backend.result_type(x.dtype, "float32")

    def forward(x, gamma, beta, shift):
        mean, variance = moments(x, shift, axes)
        inverse = ops.rsqrt(variance + epsilon)
        factor, offset = (_beside(y, x, axes, wide) for y in (gamma, beta))
        outputs = (ops.cast(x, wide) - mean) * (inverse * factor) + offset
        return ops.cast(outputs, dtype), (mean, inverse)

    def backward(args, residuals, upstream):
        x, gamma, beta, _ = args
        mean, inverse = residuals
        upstream = ops.cast(upstream, wide)
        normal = (ops.cast(x, wide) - mean) * inverse
        to_beta = ops.sum(upstream, axis=axes, keepdims=True)
        to_gamma = ops.sum(upstream * normal, axis=axes, keepdims=True)
        sizes = [ops.shape(x)[axis] for axis in axes]
        count = functools.reduce(ops.multiply, (ops.cast(n, wide) for n in sizes))
        to_x = upstream - (to_beta + normal * to_gamma) / count
        to_x = to_x * (inverse * _beside(gamma, x, axes, wide))
        return (
            ops.cast(to_x, x.dtype),
            ops.cast(ops.reshape(to_gamma, gamma.shape), gamma.dtype),
            ops.cast(ops.reshape(to_beta, beta.shape), beta.dtype),
            None,
        )

    return with_gradient(forward, backward)(x, gamma, beta, shift)


def _beside(vector, x, axes, dtype):
    """Returns one number a channel in a shape that goes with `x`."""
    shape = [1 if axis in axes else -1 for axis in range(len(x.shape))]
    return ops.cast(ops.reshape(vector, shape), dtype)
