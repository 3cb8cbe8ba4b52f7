import keras
import numpy as np
import pytest

from tests.contract import random_like
from tests.visualization.small_model import image_model
from tokenlearner_keras.layers import TokenLearner
from tokenlearner_keras.visualization import (
    AttentionMaps,
    attention_maps,
    attention_model,
    attention_tensors,
)


def test_attention_maps_are_those_of_the_layer():
    model = image_model()
    images = random_like((5, 8, 8, 3))
    maps = attention_maps(model, images, batch_size=2)
    features = model.get_layer("patches")(images)
    _, expected = model.get_layer("first")(features, return_attention_maps=True)
    assert maps.shape == (5, 4, 4, 4)
    np.testing.assert_allclose(
        maps, keras.ops.convert_to_numpy(expected), rtol=1e-5, atol=1e-7
    )
    second = attention_maps(model, images, layer="second")
    assert second.shape == (5, 2, 2, 2)
    # A softmax over the positions.
    np.testing.assert_allclose(second.sum(axis=(2, 3)), 1.0, rtol=1e-5)


def test_attention_tensors_leave_the_model_alone(tmp_path):
    model = image_model()
    images = random_like((2, 8, 8, 3))
    before = model.predict(images, verbose=0)
    config = model.get_config()
    assert list(attention_tensors(model)) == ["first", "second"]
    assert list(attention_tensors(model)) == ["first", "second"]
    assert model.get_config() == config
    model.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(reloaded.predict(images, verbose=0), before, rtol=1e-5)
    assert list(attention_tensors(reloaded)) == ["first", "second"]


def test_attention_model_shares_weights():
    model = image_model()
    images = random_like((2, 8, 8, 3))
    maps_model = attention_model(model, "first")
    before = maps_model.predict(images, verbose=0)
    for variable in model.get_layer("first").trainable_variables:
        variable.assign(2 * variable + 0.1)
    after = maps_model.predict(images, verbose=0)
    assert np.abs(after - before).max() > 1e-3


@pytest.mark.parametrize("kind", ["functional", "sequential"])
def test_nested_models(kind):
    backbone = image_model()
    if kind == "sequential":
        backbone = keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                keras.layers.Conv2D(6, 2, strides=2, name="patches"),
                TokenLearner.v1(4, name="first"),
                keras.layers.Flatten(),
            ],
            name="small",
        )
    inputs = keras.Input((8, 8, 3))
    outputs = keras.layers.Dense(2)(backbone(keras.layers.Rescaling(2.0)(inputs)))
    model = keras.Model(inputs, outputs)
    assert next(iter(attention_tensors(model))) == "small/first"
    images = random_like((2, 8, 8, 3))
    np.testing.assert_allclose(
        attention_maps(model, images),
        attention_maps(backbone, 2 * images),
        rtol=1e-5,
        atol=1e-7,
    )


def test_a_layer_in_two_models():
    # The same layer is first called elsewhere: its maps here are of this model's input.
    layer = TokenLearner.v1(2, name="shared")
    other = keras.Input((4, 4, 3))
    keras.Model(other, layer(other))
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, layer(keras.layers.Rescaling(3.0)(inputs)))
    images = random_like((2, 4, 4, 3))
    _, expected = layer(3 * images, return_attention_maps=True)
    np.testing.assert_allclose(
        attention_maps(model, images),
        keras.ops.convert_to_numpy(expected),
        rtol=1e-5,
        atol=1e-7,
    )


def test_clips():
    inputs = keras.Input((3, 4, 6, 5))
    model = keras.Model(inputs, TokenLearner.video(2)(inputs))
    maps = attention_maps(model, random_like((2, 3, 4, 6, 5)))
    assert maps.shape == (2, 3, 2, 4, 6)


def test_maps_model_can_be_saved(tmp_path):
    maps_model = attention_model(image_model())
    maps_model.save(tmp_path / "maps.keras")
    reloaded = keras.saving.load_model(tmp_path / "maps.keras")
    images = random_like((2, 8, 8, 3))
    np.testing.assert_allclose(
        reloaded.predict(images, verbose=0),
        maps_model.predict(images, verbose=0),
        rtol=1e-5,
        atol=1e-7,
    )
    with pytest.raises(ValueError, match="`layer` must be a `TokenLearner`"):
        AttentionMaps(keras.layers.Dense(2))


def test_models_without_maps():
    inputs = keras.Input((4,))
    plain = keras.Model(inputs, keras.layers.Dense(2)(inputs), name="plain")
    with pytest.raises(ValueError, match="Model 'plain' has no `TokenLearner` layer"):
        attention_model(plain)
    with pytest.raises(
        ValueError, match=r"one of \('first', 'second'\).*layer='third'"
    ):
        attention_model(image_model(), "third")

    class Subclassed(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match=r"functional model.*of type Subclassed"):
        attention_tensors(Subclassed())
    with pytest.raises(ValueError, match=r"functional model.*of type Sequential"):
        attention_tensors(keras.Sequential([TokenLearner(2)]))
