"""Decoding of video files with PyAV: by time, upright, and with every fault named."""

import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

logger = logging.getLogger("tokenlearner_keras")

# A file that ends earlier than it says by more than this is called truncated: seconds,
# and a share of its length.
TRUNCATION_SECONDS, TRUNCATION_SHARE = 0.25, 0.05


class VideoReadError(ValueError):
    """A video file that gives no frame.

    Args:
        path: The file.
        kind: `"missing"`, `"unreadable"`, `"no video stream"` or `"no frames"`.
        detail: What was seen.
    """

    def __init__(self, path: str, kind: str, detail: str = ""):
        super().__init__(f"{path}: {kind}{': ' + detail if detail else ''}")
        self.path, self.kind, self.detail = path, kind, detail


@dataclass
class VideoFaults:
    """Counts the files of a dataset that were skipped or only partly read.

    Each file is logged once, as a warning of the logger `"tokenlearner_keras"`, and
    `summary` gives the count. It may be shared by threads and by datasets.

    Attributes:
        files: The kind and the detail of the last fault, by file.
    """

    files: dict[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self):
        self._lock = threading.Lock()

    def add(self, path: str, kind: str, detail: str = "") -> None:
        """Notes a fault of a file."""
        with self._lock:
            is_new = path not in self.files
            self.files[path] = (kind, detail)
        if is_new:
            logger.warning("%s: %s%s", path, kind, f": {detail}" if detail else "")

    def counts(self) -> dict[str, int]:
        """Number of files by kind of fault."""
        with self._lock:
            return dict(Counter(kind for kind, _ in self.files.values()))

    def summary(self) -> str:
        """One line: how many files, by kind, with up to five of their names."""
        counts = self.counts()
        if not counts:
            return "no faulty video files"
        with self._lock:
            names = list(self.files)
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        return f"{len(names)} faulty video files ({kinds}): {shown}"


@dataclass
class VideoFrames:
    """Frames of a video.

    Attributes:
        frames: `uint8` array of shape `(time, height, width, 3)`, RGB, upright.
        times: When each frame is shown, in seconds from the video's start.
        fault: `None`, or what went wrong on the way (`"truncated: ..."`).
    """

    frames: np.ndarray
    times: np.ndarray
    fault: str | None = None


class VideoReader:
    """An open video file, read from any time on.

    Args:
        path: The file; any container and codec that FFmpeg reads.
        short_side: Height or width, whichever is less, that frames are resized to,
            with the shape of the picture on screen (pixels need not be square). `None`
            keeps the stored pixels.
        num_threads: Decoding threads. One, since a dataset reads several files at once.

    Raises:
        VideoReadError: if there is no such file, it is no video, or it has no frame.
    """

    def __init__(self, path, short_side: int | None = None, num_threads: int = 1):
        import av

        self.path, self.short_side = os.fspath(path), short_side
        # What went wrong so far, and where the frames end; known after reading.
        self.fault, self.end = None, 0.0
        self._size = None
        if not os.path.isfile(self.path):
            raise VideoReadError(self.path, "missing")
        try:
            self.container = av.open(self.path, metadata_errors="replace")
        except (av.error.FFmpegError, OSError) as error:
            raise VideoReadError(self.path, "unreadable", str(error)) from None
        if not self.container.streams.video:
            self.container.close()
            raise VideoReadError(self.path, "no video stream")
        self.stream = self.container.streams.video[0]
        codec = self.stream.codec_context
        if codec is None:
            self.container.close()
            raise VideoReadError(self.path, "unreadable", "unknown codec")
        codec.thread_count = num_threads
        codec.thread_type = "NONE" if num_threads == 1 else "AUTO"
        rate = self.stream.average_rate or self.stream.guessed_rate
        # Frames a second of the file, on average; a guess where it does not say.
        self.fps = float(rate) if rate else 25.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.container.close()

    @property
    def duration(self) -> float | None:
        """Length in seconds by the file's own account, or `None`."""
        if self.stream.duration and self.stream.time_base:
            return float(self.stream.duration * self.stream.time_base)
        if self.container.duration:
            return self.container.duration / 1e6
        return None

    def frames(
        self, start: float = 0.0, fps: float | None = None
    ) -> Iterator[tuple[float, np.ndarray]]:
        """Yields the time and the picture of each frame, from `start` on.

        With `fps`, a frame for each of `start + k / fps`: the one that is on screen at
        that time, so that a video of variable frame rate keeps its pace, and a slow one
        repeats frames. Without, every stored frame. Damaged parts are skipped; `fault`
        tells afterwards.

        Args:
            start: Seconds from the start of the video.
            fps: Frames a second, or `None` for the stored frames.
        """
        shown, index, end = None, 0, 0.0
        for time, frame in self._decode_from(start):
            end = max(end, time + _length(frame, self.fps))
            if fps is None:
                if time >= start - 1e-6:
                    yield time, self._picture(frame)
                continue
            picture = None
            while shown is not None and start + index / fps < time - 1e-6:
                picture = self._picture(shown) if picture is None else picture
                yield start + index / fps, picture
                index += 1
            shown = frame
        if fps is not None and shown is not None:
            picture = None
            # The first frame always counts: a video of one frame may have no length.
            while start + index / fps < end - 1e-6 or (index == 0 and start == 0):
                picture = self._picture(shown) if picture is None else picture
                yield start + index / fps, picture
                index += 1
        self.end = end
        self._note_the_end()

    def _decode_from(self, start):
        """Yields (seconds, frame) from `start` or a key frame before it on."""
        origin = float((self.stream.start_time or 0) * (self.stream.time_base or 0))
        if start > 0 and self.stream.time_base:
            import av

            target = int((start + origin) / self.stream.time_base)
            try:
                self.container.seek(target, stream=self.stream)
            except (av.error.FFmpegError, OSError):
                self._reopen()
            else:
                first = next(self._decode(origin), None)
                if first is None or first[0] > start:
                    self._reopen()  # the index of the file is wrong
                else:
                    self.container.seek(target, stream=self.stream)
        yield from self._decode(origin)

    def _decode(self, origin):
        import av

        errors, count = 0, 0
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                frames = packet.decode()
            except (av.error.FFmpegError, OSError) as error:
                errors += 1
                self.fault = f"damaged: {errors} packets cannot be decoded ({error})"
                continue
            for frame in frames:
                time = frame.time
                time = count / self.fps if time is None else time - origin
                count += 1
                yield time, frame

    def _reopen(self):
        import av

        threads = self.stream.codec_context.thread_count
        self.container.close()
        self.container = av.open(self.path, metadata_errors="replace")
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = threads

    def _note_the_end(self):
        duration = self.duration
        if duration is None:
            return
        missing = duration - self.end
        if missing > max(TRUNCATION_SECONDS, TRUNCATION_SHARE * duration):
            self.fault = f"truncated: {self.end:.2f} of {duration:.2f} seconds"

    def _picture(self, frame):
        if self._size is None:
            self._size = self._target_size(frame)
        width, height = self._size
        resized = frame.reformat(width, height, "rgb24", interpolation="BILINEAR")
        return upright(resized.to_ndarray(), _display_matrix(frame))

    def _target_size(self, frame):
        """Width and height of the frames; all are as the first."""
        width, height = frame.width, frame.height
        if self.short_side is None:
            return width, height
        aspect = self.stream.sample_aspect_ratio
        if aspect and aspect > 0:
            width = max(1, width * float(aspect))  # pixels that are not square
        scale = self.short_side / min(width, height)
        return tuple(
            max(self.short_side, round(side * scale)) for side in (width, height)
        )


def _length(frame, fps):
    """Seconds that a frame is shown."""
    duration = getattr(frame, "duration", None)
    if duration and frame.time_base:
        return float(duration * frame.time_base)
    return 1 / fps


def _display_matrix(frame):
    """The two by two part of a frame's display matrix, or `None`."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    return np.frombuffer(bytes(data), "<i4").reshape(3, 3)[:2, :2]


def upright(picture: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Turns a stored picture as its display matrix says.

    Args:
        picture: Array of shape `(height, width, channels)`.
        matrix: Array of shape `(2, 2)` that sends a stored place `(x, y)`, as a row, to
            the place on screen, or `None`. Only quarter turns and mirrors count.

    Returns:
        The array, turned.
    """
    if matrix is None:
        return picture
    (a, b), (c, d) = matrix.astype("int64")
    if abs(b) > abs(a):
        picture = picture.swapaxes(0, 1)
        flips = (b < 0, c < 0)
    else:
        flips = (d < 0, a < 0)
    for axis, flip in enumerate(flips):
        if flip:
            picture = np.flip(picture, axis)
    return picture


def read_video(
    path,
    start: float = 0.0,
    num_frames: int | None = None,
    fps: float | None = None,
    short_side: int | None = None,
) -> VideoFrames:
    """Reads the frames of a video file from a time on.

    Args:
        path: The file.
        start: Seconds from the start of the video.
        num_frames: The most frames to read. `None` reads to the end.
        fps: Frames a second to sample at. `None` takes the stored frames.
        short_side: Size that the shorter side is resized to. `None` does not resize.

    Returns:
        `VideoFrames`; fewer frames than asked for if the video ends before.

    Raises:
        VideoReadError: if the file gives no frame from `start` on.
    """
    frames, times = [], []
    with VideoReader(path, short_side) as reader:
        for time, frame in reader.frames(start, fps):
            frames.append(frame)
            times.append(time)
            if len(frames) == num_frames:
                break
        fault = reader.fault
    if not frames:
        raise VideoReadError(os.fspath(path), "no frames", fault or "")
    return VideoFrames(np.stack(frames), np.array(times), fault)


def clip_start(duration: float | None, span: float, position: float) -> float:
    """Where a clip of `span` seconds starts that lies at `position` in [0, 1]."""
    if duration is None or not math.isfinite(duration):
        return 0.0
    return max(0.0, duration - span) * position
