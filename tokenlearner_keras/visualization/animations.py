"""Attention maps over clips, as moving pictures."""

import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from tokenlearner_keras.visualization.pictures import attention_tiles, lay_out

SUFFIXES = (".gif", ".mp4")


def attention_animation(
    clips,
    maps,
    tokens: Sequence[int] | None = None,
    value_range: tuple[float, float] | None = None,
    columns: int | None = None,
    **kwargs,
) -> np.ndarray:
    """Returns clips that play the input beside the overlays of its tokens.

    Args:
        clips: Array of shape `(batch, time, height, width, channels)`.
        maps: Array of shape `(batch, time, num_tokens, grid_height, grid_width)`.
        tokens: Indices of the tokens to show. `None` shows all.
        value_range: As for `attention_overlay`.
        columns: int or `None`. Tiles side by side: the input, then the tokens. `None`
            makes the picture about square.
        **kwargs: Further arguments of `attention_overlay`.

    Returns:
        float32 array of RGB values in [0, 1], of shape
        `(batch, time, rows * height, columns * width, 3)`; black where no tile is.

    Raises:
        ValueError: for images instead of clips, and as `attention_overlay`.
    """
    if np.ndim(clips) != 5:
        raise ValueError(
            "Argument `clips` must have the shape (batch, time, height, width, "
            f"channels). Received: clips of shape {np.shape(clips)}"
        )
    tiles = attention_tiles(clips, maps, tokens, value_range, **kwargs)
    if columns is None:
        columns = math.ceil(math.sqrt(tiles.shape[2]))
    return lay_out(tiles, columns)


def save_animation(path: str | Path, frames, fps: float = 12.0) -> Path:
    """Writes one moving picture as a GIF or an MP4 file.

    Args:
        path: File to write. Its suffix, `.gif` or `.mp4`, chooses the format. GIF needs
            Pillow, MP4 (H.264) needs PyAV.
        frames: Array of shape `(time, height, width, 3)` of RGB values in [0, 1] or of
            uint8: one element of what `attention_animation` returns. In an MP4 file,
            a last odd row or column is repeated, since the format needs even sizes.
        fps: float. Frames a second. GIF keeps hundredths of a second, and at most 50
            frames a second.

    Returns:
        The path.

    Raises:
        ValueError: for another suffix, frames of another shape, values outside [0, 1],
            or frames a second that are not positive.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"Argument `path` must end in one of {SUFFIXES}. Received: path={path}"
        )
    if not fps > 0:
        raise ValueError(
            f"Argument `fps` must be a positive number. Received: fps={fps!r}"
        )
    frames = _to_uint8(frames)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    write = _write_gif if path.suffix.lower() == ".gif" else _write_mp4
    try:
        write(partial, frames, fps)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _to_uint8(frames):
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            "Argument `frames` must have the shape (time, height, width, 3). "
            f"Received: frames of shape {frames.shape}"
        )
    if frames.dtype == np.uint8:
        return frames
    if not (frames.min() >= -1e-3 and frames.max() <= 1 + 1e-3):
        raise ValueError(
            "The values of `frames` must lie in [0, 1], or be uint8. Received: values "
            f"from {frames.min():.3g} to {frames.max():.3g}"
        )
    return np.round(np.clip(frames, 0, 1) * 255).astype("uint8")


def _write_gif(path, frames, fps):
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "GIF files are written with Pillow: "
            "`pip install tokenlearner-keras[images]`."
        ) from error
    # Hundredths of a second; viewers slow down what has less than two.
    duration = 10 * max(2, round(100 / fps))
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(
        path,
        format="GIF",
        save_all=True,
        append_images=others,
        duration=duration,
        loop=0,
    )


def _write_mp4(path, frames, fps):
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "MP4 files are written with PyAV: `pip install tokenlearner-keras[video]`."
        ) from error
    odd = [(0, size % 2) for size in frames.shape[1:3]]
    frames = np.pad(frames, [(0, 0), *odd, (0, 0)], mode="edge")
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1000)
        )
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"  # What browsers play.
        stream.options = {"crf": "18"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, "rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
