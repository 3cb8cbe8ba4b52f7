"""Cutting clips out of frames: in time and in the picture."""

import numpy as np

from tokenlearner_keras.layers._checks import check_choice, check_positive_int

SHORT_CLIPS = ("loop", "hold")
LAST_SEGMENTS = ("shift", "pad", "drop")


def clip_indices(num_frames: int, clip_length: int, short: str = "loop") -> np.ndarray:
    """Indices that make a clip of `clip_length` frames of the first `num_frames`.

    Args:
        num_frames: int. How many frames there are.
        clip_length: int. How many the clip has.
        short: What a clip with too few frames does: `"loop"` starts again at its first
            frame, `"hold"` repeats its last.

    Returns:
        Integer array of shape `(clip_length,)`.
    """
    check_positive_int("num_frames", num_frames)
    check_positive_int("clip_length", clip_length)
    check_choice("short", short, SHORT_CLIPS)
    indices = np.arange(clip_length)
    if short == "loop":
        return indices % num_frames
    return np.minimum(indices, num_frames - 1)


def segment_starts(
    num_frames: int, clip_length: int, last: str = "shift"
) -> np.ndarray:
    """First frames of the consecutive segments that cover a video.

    Args:
        num_frames: int. How many frames the video has.
        clip_length: int. How many a segment has.
        last: What becomes of frames left over at the end: `"shift"` adds a segment
            that ends with the video and overlaps the one before, `"pad"` adds one that
            starts where the one before ends and is a short clip, `"drop"` leaves them
            out. A video shorter than one segment always is one short clip.

    Returns:
        Integer array of at least one start.
    """
    check_positive_int("num_frames", num_frames)
    check_positive_int("clip_length", clip_length)
    check_choice("last", last, LAST_SEGMENTS)
    count, rest = divmod(num_frames, clip_length)
    starts = list(range(0, count * clip_length, clip_length))
    if not starts:
        return np.array([0])
    if rest and last != "drop":
        starts.append(num_frames - (clip_length if last == "shift" else rest))
    return np.array(starts)


def crop(frames: np.ndarray, size, place=(0.5, 0.5)) -> np.ndarray:
    """Crops a window of `size` (height, width) out of every frame.

    Args:
        frames: Array of shape `(..., height, width, channels)`.
        size: Height and width of the window.
        place: Where it lies, from 0 (top, left) to 1 (bottom, right); the default is
            the middle.

    Returns:
        A view of shape `(..., *size, channels)`.
    """
    starts = []
    for axis in range(2):
        room = frames.shape[axis - 3] - size[axis]
        if room < 0:
            raise ValueError(
                "Argument `size` must fit into the frames. "
                f"Received: size={tuple(size)} for frames of "
                f"{frames.shape[-3]} x {frames.shape[-2]}"
            )
        starts.append(min(room, int(place[axis] * (room + 1))))
    top, left = starts
    return frames[..., top : top + size[0], left : left + size[1], :]
