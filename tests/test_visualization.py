import keras
import numpy as np
import pytest

from tests.contract import random_like
from tokenlearner_keras import visualization
from tokenlearner_keras.layers import TokenLearner
from tokenlearner_keras.visualization import (
    AttentionMapsCallback,
    attention_figure,
    attention_grid,
    attention_maps,
    attention_model,
    attention_overlay,
    attention_tensors,
)


def image_model(num_tokens=4):
    """A small model with two TokenLearners: on a grid and on a flattened grid."""
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(6, 2, strides=2, name="patches")(inputs)
    x = TokenLearner.v1(num_tokens, name="first")(x)
    x = keras.layers.Dense(6)(x)
    x = TokenLearner.v11(2, grid_shape=(2, 2), name="second")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x), name="small")


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
        visualization.AttentionMaps(keras.layers.Dense(2))


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


def test_overlay_values():
    # One map that is high in the left half: there the colour, elsewhere the image.
    images = np.full((1, 4, 4, 3), 0.5, "float32")
    maps = np.zeros((1, 2, 4, 4), "float32")
    maps[0, 0, :, :2] = 0.3
    overlay = attention_overlay(
        images,
        maps,
        value_range=(0, 1),
        alpha=1.0,
        colormap="gray",
        interpolation="nearest",
    )
    assert overlay.shape == (1, 2, 4, 4, 3)
    assert overlay.dtype == np.float32
    # Stretched to 1, the top of the colormap "gray": white, fully opaque.
    np.testing.assert_allclose(overlay[0, 0, :, :2], 1.0, atol=1e-6)
    np.testing.assert_allclose(overlay[0, 0, :, 2:], 0.5, atol=1e-6)
    # A constant map has nothing to show.
    np.testing.assert_allclose(overlay[0, 1], 0.5, atol=1e-6)
    # Not stretched, the value 0.3 is the strength.
    raw = attention_overlay(
        images,
        maps,
        value_range=(0, 1),
        alpha=1.0,
        colormap="gray",
        interpolation="nearest",
        normalize="none",
    )
    grey = int(0.3 * 256) / 255
    np.testing.assert_allclose(raw[0, 0, :, :2], 0.7 * 0.5 + 0.3 * grey, atol=1e-3)
    # No opacity: the image.
    clear = attention_overlay(images, maps, value_range=(0, 1), alpha=0.0)
    np.testing.assert_allclose(clear, 0.5, atol=1e-6)


def test_overlay_places_the_map_where_it_belongs():
    images = np.zeros((1, 32, 48, 1), "uint8")
    maps = np.zeros((1, 1, 4, 6), "float32")
    maps[0, 0, 1, 4] = 1.0
    overlay = attention_overlay(images, maps)[0, 0].sum(-1)
    row, column = np.unravel_index(overlay.argmax(), overlay.shape)
    assert 8 <= row < 16
    assert 32 <= column < 40


def test_overlay_value_ranges():
    maps = np.zeros((1, 1, 2, 2), "float32")
    byte = np.full((1, 4, 4, 1), 51, "uint8")
    signed = np.full((1, 4, 4, 1), -0.6, "float32")
    unit = np.full((1, 4, 4, 1), 0.2, "float32")
    for images, value_range in ((byte, None), (signed, None), (unit, (0, 1))):
        overlay = attention_overlay(images, maps, value_range=value_range)
        np.testing.assert_allclose(overlay, 0.2, atol=1e-6)
    with pytest.raises(ValueError, match=r"must lie in `value_range`.*-1\.0, 1\.0.*51"):
        attention_overlay(byte.astype("float32"), maps)


def test_overlay_chooses_tokens_and_videos():
    images = np.random.default_rng(0).random((2, 3, 8, 10, 3), dtype="float32")
    maps = np.random.default_rng(1).random((2, 3, 4, 2, 5), dtype="float32")
    overlay = attention_overlay(images, maps, tokens=[3, 1], value_range=(0, 1))
    assert overlay.shape == (2, 3, 2, 8, 10, 3)
    # Frame by frame, the same as images.
    frame = attention_overlay(images[:, 1], maps[:, 1], [1], value_range=(0, 1))
    np.testing.assert_allclose(overlay[:, 1, 1], frame[:, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("images", "maps"),
    [
        ((2, 8, 8, 3), (3, 4, 2, 2)),
        ((2, 8, 8, 4), (2, 4, 2, 2)),
        ((2, 8, 8), (2, 4, 2, 2)),
        ((2, 8, 8, 3), (2, 3, 4, 2, 2)),
        ((2, 3, 8, 8, 3), (2, 4, 4, 2, 2)),
    ],
)
def test_shapes_that_do_not_fit(images, maps):
    with pytest.raises(ValueError, match=r"Received: images of shape .* and maps of s"):
        attention_overlay(np.zeros(images), np.zeros(maps))


def test_invalid_arguments():
    images, maps = np.zeros((1, 4, 4, 3)), np.zeros((1, 2, 2, 2))
    with pytest.raises(ValueError, match=r"`tokens` must list indices from 0 to 1"):
        attention_overlay(images, maps, tokens=[2])
    with pytest.raises(ValueError, match=r"Received: tokens=\[\]"):
        attention_overlay(images, maps, tokens=[])
    with pytest.raises(ValueError, match="`alpha` must be a number in"):
        attention_overlay(images, maps, alpha=2)
    with pytest.raises(ValueError, match=r"`colormap` must be .* colormap='blau'"):
        attention_overlay(images, maps, colormap="blau")
    with pytest.raises(ValueError, match="argument `normalize`"):
        attention_overlay(images, maps, normalize="yes")
    with pytest.raises(ValueError, match="argument `interpolation`"):
        attention_overlay(images, maps, interpolation="lanczos")
    with pytest.raises(ValueError, match="2 titles for 1 examples"):
        attention_figure(images, maps, titles=["a", "b"])
    with pytest.raises(ValueError, match="`every` must be an integer of at least 1"):
        AttentionMapsCallback("logs", images, every=0)


def test_grid():
    images = np.random.default_rng(0).random((2, 6, 8, 1), dtype="float32")
    maps = np.random.default_rng(1).random((2, 4, 3, 2), dtype="float32")
    grid = attention_grid(images, maps, tokens=[0, 2], value_range=(0, 1))
    assert grid.shape == (2, 6, 24, 3)
    np.testing.assert_allclose(grid[:, :, :8], np.repeat(images, 3, -1), atol=1e-6)
    overlay = attention_overlay(images, maps, [2], value_range=(0, 1))
    np.testing.assert_allclose(grid[:, :, 16:], overlay[:, 0], atol=1e-6)

    clips = np.stack([images, 1 - images, images], axis=1)
    clip_maps = np.stack([maps] * 3, axis=1)
    strip = attention_grid(clips, clip_maps, tokens=[2], value_range=(0, 1))
    assert strip.shape == (2, 12, 24, 3)
    np.testing.assert_allclose(
        strip[:, :6, 8:16], np.repeat(1 - images, 3, -1), atol=1e-6
    )
    np.testing.assert_allclose(strip[:, 6:, 16:], overlay[:, 0], atol=1e-6)


def test_figure(tmp_path):
    from PIL import Image

    images = np.random.default_rng(0).random((2, 8, 8, 1), dtype="float32")
    maps = np.random.default_rng(1).random((2, 8, 4, 4), dtype="float32")
    figure = attention_figure(
        images, maps, tokens=[0, 2, 5], titles=["a", "b"], value_range=(0, 1)
    )
    assert len(figure.axes) == 2 * 4
    assert [axis.get_title() for axis in figure.axes[:4]] == [
        "input",
        "token 0",
        "token 2",
        "token 5",
    ]
    assert [figure.axes[i].get_ylabel() for i in (0, 4)] == ["a", "b"]
    overlay = attention_overlay(images, maps, [5], value_range=(0, 1))
    shown = figure.axes[7].get_images()[0].get_array()
    np.testing.assert_allclose(shown, overlay[1, 0], atol=1e-6)
    figure.savefig(tmp_path / "maps.png", dpi=50)
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.width > picture.height > 50


def test_figure_of_clips():
    clips = np.random.default_rng(0).random((2, 5, 8, 8, 3), dtype="float32")
    maps = np.random.default_rng(1).random((2, 5, 8, 4, 4), dtype="float32")
    figure = attention_figure(
        clips, maps, tokens=[7], titles=["run", "jump"], value_range=(0, 1)
    )
    # Two clips of two rows (input, token 7) and five frames.
    assert len(figure.axes) == 2 * 2 * 5
    labels = [figure.axes[i].get_ylabel() for i in range(0, 20, 5)]
    assert labels == ["run", "token 7", "jump", "token 7"]
    overlay = attention_overlay(clips, maps, [7], value_range=(0, 1))
    shown = figure.axes[5 * 3 + 2].get_images()[0].get_array()
    np.testing.assert_allclose(shown, overlay[1, 2, 0], atol=1e-6)


@pytest.mark.tensorflow
def test_callback_writes_what_tensorboard_reads(tmp_path):
    pytest.importorskip("tensorboard")
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = image_model()
    model.compile("adam", "mse")
    images = np.tanh(random_like((4, 8, 8, 3)))
    callback = AttentionMapsCallback(tmp_path, images[:2], tokens=[0, 3], every=2)
    model.fit(
        images,
        np.zeros((4, 3)),
        epochs=5,
        batch_size=4,
        verbose=0,
        callbacks=[callback],
    )
    events = EventAccumulator(
        str(tmp_path), size_guidance={"images": 0, "tensors": 0}
    ).Reload()
    records = events.Tensors("attention_maps")
    assert [record.step for record in records] == [1, 3]
    width, height, *pictures = records[-1].tensor_proto.string_val
    assert (int(width), int(height)) == (24, 8)
    assert len(pictures) == 2
    picture = tf.io.decode_png(pictures[1]).numpy()
    expected = np.repeat((images[1:2, ..., :] + 1) / 2, 1, -1)[0]
    np.testing.assert_allclose(picture[:, :8] / 255, expected, atol=1 / 255)


def test_missing_matplotlib_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install tokenlearner-keras\[images\]"):
        visualization.attention_overlay(np.zeros((1, 4, 4, 3)), np.zeros((1, 2, 2, 2)))
