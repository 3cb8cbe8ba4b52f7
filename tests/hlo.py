"""Reads sizes off the programs that XLA makes (TensorFlow backend)."""

import math
import re

import numpy as np
import tensorflow as tf

SHAPE = re.compile(r"\b(?:pred|[suf]\d+|bf16)\[([\d,]*)\]")


def largest_buffer(function, *inputs):
    """Elements of the largest array in the optimised XLA program of `function`."""
    compiled = tf.function(function, jit_compile=True)
    hlo = compiled.experimental_get_compiler_ir(*inputs)(stage="optimized_hlo")
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) for dims in SHAPE.findall(hlo)
    ]
    return max(sizes)


def forward_and_backward(layer, inputs):
    """A function of the inputs that returns the outputs and every gradient."""
    if not layer.built:
        layer.build(inputs.shape)
    variables = [v.value for v in layer.trainable_variables]

    def function(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = layer(x)
            loss = tf.reduce_sum(outputs * outputs)
        return outputs, tape.gradient(loss, [x, *variables])

    return function


def constant(shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return tf.constant(values, tf.float32)
