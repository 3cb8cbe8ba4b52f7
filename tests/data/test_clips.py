import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenlearner_keras.data.clips import clip_indices, crop, segment_starts


def test_clip_indices():
    assert clip_indices(3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert clip_indices(3, 7, "hold").tolist() == [0, 1, 2, 2, 2, 2, 2]
    assert clip_indices(9, 4).tolist() == clip_indices(9, 4, "hold").tolist()


def test_segment_starts():
    assert segment_starts(128, 64).tolist() == [0, 64]
    assert segment_starts(150, 64).tolist() == [0, 64, 86]
    assert segment_starts(150, 64, "pad").tolist() == [0, 64, 128]
    assert segment_starts(150, 64, "drop").tolist() == [0, 64]
    for last in ("shift", "pad", "drop"):
        assert segment_starts(10, 64, last).tolist() == [0]


@given(st.integers(1, 300), st.integers(1, 70), st.sampled_from(["shift", "pad"]))
def test_segments_cover_every_frame_and_stay_inside(num_frames, clip_length, last):
    seen = np.zeros(num_frames, int)
    for start in segment_starts(num_frames, clip_length, last):
        end = start + clip_length
        assert 0 <= start < num_frames
        assert last == "pad" or end <= max(num_frames, clip_length)
        seen[start:end] += 1
    assert seen.min() == 1
    assert seen.max() <= (2 if last == "shift" else 1)


def test_crop():
    frames = np.arange(2 * 5 * 7 * 1).reshape(2, 5, 7, 1)
    np.testing.assert_array_equal(crop(frames, (3, 3)), frames[:, 1:4, 2:5])
    np.testing.assert_array_equal(crop(frames, (3, 3), (0, 0)), frames[:, :3, :3])
    np.testing.assert_array_equal(crop(frames, (3, 3), (1, 1)), frames[:, -3:, -3:])
    with pytest.raises(ValueError, match=r"size=\(6, 3\) for frames of 5 x 7"):
        crop(frames, (6, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clip_indices(0, 4), "`num_frames`"),
        (lambda: clip_indices(4, 0), "`clip_length`"),
        (lambda: clip_indices(4, 4, "mirror"), "Received: short='mirror'"),
        (lambda: segment_starts(4, 4, "wrap"), "Received: last='wrap'"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
