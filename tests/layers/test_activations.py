import keras
import numpy as np

from tests.contract import random_like
from tokenlearner_keras.layers.activations import gelu


def test_gelu_is_the_tanh_approximation():
    x = np.linspace(-4, 4, 33).astype("float32")
    cube = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    expected = 0.5 * x * (1 + np.tanh(cube))
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(gelu(x)), expected, rtol=1e-5, atol=1e-6
    )


def test_a_layer_keeps_it_when_copied_and_reloaded(tmp_path):
    # By its bare name it would come back as Keras's own, exact `gelu`.
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(3, activation=gelu)(inputs))
    model.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    x = random_like((5, 4))
    clone.set_weights(model.get_weights())
    for other in (reloaded, clone):
        assert other.layers[-1].activation is gelu
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(other(x)), keras.ops.convert_to_numpy(model(x))
        )
