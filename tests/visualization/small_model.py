"""A small model with two TokenLearners, for the tests of this folder."""

import keras

from tokenlearner_keras.layers import TokenLearner


def image_model(num_tokens=4):
    """On a grid, and on a flattened grid."""
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(6, 2, strides=2, name="patches")(inputs)
    x = TokenLearner.v1(num_tokens, name="first")(x)
    x = keras.layers.Dense(6)(x)
    x = TokenLearner.v11(2, grid_shape=(2, 2), name="second")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x), name="small")
