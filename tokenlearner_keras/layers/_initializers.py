import math

import keras


def clone_initializer(initializer):
    """Returns a fresh copy of a Keras initializer; other callables as they are.

    A seeded initializer object that is used twice would give the same values twice.
    """
    return initializer.clone() if hasattr(initializer, "clone") else initializer


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class SquareInitializer(keras.initializers.Initializer):
    """Initializes a kernel of d x d numbers as the matrix that it stands for.

    `keras.layers.MultiHeadAttention` holds its d x d maps as `(d, heads, d / heads)`
    and `(heads, d / heads, d)`. An initializer that reads fans off such a shape takes
    the first axis for a window and starts the maps several times too small.

    Args:
        initializer: Initializer of the `(d, d)` matrix.
    """

    def __init__(self, initializer):
        self.initializer = keras.initializers.get(initializer)

    def __call__(self, shape, dtype=None):
        side = math.isqrt(math.prod(shape))
        if side * side != math.prod(shape):  # A bias, or heads that do not divide d.
            return self.initializer(shape, dtype=dtype)
        return keras.ops.reshape(self.initializer((side, side), dtype=dtype), shape)

    def clone(self):
        return SquareInitializer(clone_initializer(self.initializer))

    def get_config(self):
        return {"initializer": keras.initializers.serialize(self.initializer)}
