import numpy as np
import pytest

from tokenlearner_keras.visualization import (
    attention_figure,
    attention_grid,
    attention_overlay,
)


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
    with pytest.raises(ValueError, match="`columns` must be an integer of at least 1"):
        attention_grid(images, maps, columns=0, value_range=(0, 1))
    with pytest.raises(ValueError, match=r"must be `None` for clips.*columns=2"):
        attention_grid(images[None], maps[None], columns=2, value_range=(0, 1))


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


def test_grid_of_all_tokens():
    # The input and 8 tokens as 3 rows of 3, and as 2 rows of 5 with a black last one.
    images = np.random.default_rng(0).random((2, 6, 8, 3), dtype="float32")
    maps = np.random.default_rng(1).random((2, 8, 3, 4), dtype="float32")
    overlay = attention_overlay(images, maps, value_range=(0, 1))
    grid = attention_grid(images, maps, value_range=(0, 1), columns=3)
    assert grid.shape == (2, 18, 24, 3)
    np.testing.assert_allclose(grid[:, :6, :8], images, atol=1e-6)
    for token in range(8):
        row, column = divmod(token + 1, 3)
        tile = grid[:, 6 * row : 6 * row + 6, 8 * column : 8 * column + 8]
        np.testing.assert_array_equal(tile, overlay[:, token])
    grid = attention_grid(images, maps, value_range=(0, 1), columns=5)
    assert grid.shape == (2, 12, 40, 3)
    np.testing.assert_array_equal(grid[:, 6:, 24:32], overlay[:, 7])
    np.testing.assert_array_equal(grid[:, 6:, 32:], 0)


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
    assert [axis.get_title() for axis in figure.axes[:2]] == ["frame 0", "frame 1"]


def test_figure_of_chosen_frames():
    clips = np.random.default_rng(0).random((1, 5, 8, 8, 3), dtype="float32")
    maps = np.random.default_rng(1).random((1, 5, 2, 4, 4), dtype="float32")
    figure = attention_figure(clips, maps, frames=[4, 1], value_range=(0, 1))
    assert len(figure.axes) == 3 * 2
    assert [axis.get_title() for axis in figure.axes[:2]] == ["frame 4", "frame 1"]
    overlay = attention_overlay(clips, maps, value_range=(0, 1))
    for column, frame in enumerate((4, 1)):
        shown = figure.axes[2 + column].get_images()[0].get_array()
        np.testing.assert_allclose(shown, overlay[0, frame, 0], atol=1e-6)
    with pytest.raises(ValueError, match=r"the 5 frames of the clips.*frames=\[5\]"):
        attention_figure(clips, maps, frames=[5])
    with pytest.raises(ValueError, match=r"`frames` must.*shape \(1, 8, 8, 3\)"):
        attention_figure(clips[:, 0], maps[:, 0], frames=[0])


def test_missing_matplotlib_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install tokenlearner-keras\[images\]"):
        attention_overlay(np.zeros((1, 4, 4, 3)), np.zeros((1, 2, 2, 2)))
