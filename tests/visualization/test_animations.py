import numpy as np
import pytest

from tokenlearner_keras.visualization import (
    attention_animation,
    attention_overlay,
    save_animation,
)


def moving_square(frames=5, height=12, width=16):
    """Clips and maps in which a bright square moves to the right."""
    clips = np.zeros((1, frames, height, width, 1), "float32")
    maps = np.zeros((1, frames, 2, 3, 4), "float32")
    for frame in range(frames):
        clips[0, frame, 4:8, 2 * frame : 2 * frame + 4] = 1
        maps[0, frame, 0, 1, min(frame, 3)] = 1
        maps[0, frame, 1, 2, 3 - min(frame, 3)] = 1
    return clips, maps


def test_animation_has_the_tiles_of_every_frame():
    clips, maps = moving_square()
    overlay = attention_overlay(clips, maps, value_range=(0, 1))
    frames = attention_animation(clips, maps, value_range=(0, 1))
    # The input and two tokens: two rows of two, the last one black.
    assert frames.shape == (1, 5, 24, 32, 3)
    np.testing.assert_allclose(
        frames[:, :, :12, :16], np.repeat(clips, 3, -1), atol=1e-6
    )
    np.testing.assert_array_equal(frames[:, :, :12, 16:], overlay[:, :, 0])
    np.testing.assert_array_equal(frames[:, :, 12:, :16], overlay[:, :, 1])
    np.testing.assert_array_equal(frames[:, :, 12:, 16:], 0)
    row = attention_animation(clips, maps, [1], value_range=(0, 1), columns=2)
    assert row.shape == (1, 5, 12, 32, 3)
    np.testing.assert_array_equal(row[:, :, :, 16:], overlay[:, :, 1])


def test_gif(tmp_path):
    from PIL import Image, ImageSequence

    frames = attention_animation(*moving_square(), value_range=(0, 1))[0]
    path = save_animation(tmp_path / "tokens.gif", frames, fps=10)
    assert path == tmp_path / "tokens.gif"
    assert [p.name for p in tmp_path.iterdir()] == ["tokens.gif"]
    with Image.open(path) as picture:
        assert picture.size == (32, 24)
        assert picture.n_frames == 5
        assert picture.info["loop"] == 0  # for ever
        for frame, expected in zip(
            ImageSequence.Iterator(picture), frames, strict=True
        ):
            assert frame.info["duration"] == 100
            shown = np.asarray(frame.convert("RGB"), "float32") / 255
            # 256 colours a frame.
            assert np.abs(shown - expected).mean() < 0.02


@pytest.mark.parametrize("size", [(24, 32), (23, 31)])
def test_mp4(size, tmp_path):
    av = pytest.importorskip("av")
    frames = attention_animation(*moving_square(8), value_range=(0, 1))[0]
    frames = frames[:, : size[0], : size[1]]
    path = save_animation(str(tmp_path / "tokens.mp4"), frames, fps=12.5)
    assert [p.name for p in tmp_path.iterdir()] == ["tokens.mp4"]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == 12.5
        assert stream.pix_fmt == "yuv420p"
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert np.shape(shown) == (8, 24, 32, 3)
    shown = np.array(shown)[:, : size[0], : size[1]] / 255
    # The format halves the resolution of colours, so compare brightness.
    assert np.abs(shown.mean(-1) - frames.mean(-1)).mean() < 0.05
    # The square moves.
    columns = [frame[4:8, :16].mean((0, 2)).argmax() for frame in shown]
    assert columns == sorted(columns)
    assert columns[-1] - columns[0] >= 8


def test_uint8_frames_are_written_as_they_are(tmp_path):
    from PIL import Image

    frames = np.full((2, 4, 6, 3), 255, "uint8")
    frames[1] = 0
    path = save_animation(tmp_path / "a.GIF", frames)
    with Image.open(path) as picture:
        values = []
        for index in range(2):
            picture.seek(index)
            values.append(np.asarray(picture.convert("RGB")))
    np.testing.assert_array_equal(values, frames)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    from tokenlearner_keras.visualization import animations

    def fail(path, frames, fps):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(animations, "_write_gif", fail)
    (tmp_path / "a.gif").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        save_animation(tmp_path / "a.gif", np.zeros((1, 2, 2, 3)))
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]
    assert (tmp_path / "a.gif").read_bytes() == b"old"


def test_invalid_arguments(tmp_path):
    frames = np.zeros((2, 4, 4, 3))
    with pytest.raises(ValueError, match=r"`path` must end in .*a\.webm"):
        save_animation(tmp_path / "a.webm", frames)
    with pytest.raises(ValueError, match=r"`frames` must have the shape .*\(2, 4, 4\)"):
        save_animation(tmp_path / "a.gif", frames[..., 0])
    with pytest.raises(
        ValueError, match=r"`frames` must have the shape .*\(0, 4, 4, 3\)"
    ):
        save_animation(tmp_path / "a.gif", frames[:0])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\].*from 2 to 2"):
        save_animation(tmp_path / "a.gif", frames + 2)
    with pytest.raises(ValueError, match="`fps` must be a positive number"):
        save_animation(tmp_path / "a.gif", frames, fps=0)
    with pytest.raises(
        ValueError, match=r"`clips` must have the shape .*\(1, 4, 4, 3\)"
    ):
        attention_animation(np.zeros((1, 4, 4, 3)), np.zeros((1, 2, 2, 2)))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "extra", "name"), [("PIL", "images", "a.gif"), ("av", "video", "a.mp4")]
)
def test_missing_libraries_are_named(module, extra, name, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf"pip install tokenlearner-keras\[{extra}\]"
    ):
        save_animation(tmp_path / name, np.zeros((1, 4, 4, 3)))
