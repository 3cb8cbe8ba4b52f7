"""`tf.data` pipelines from video files: training clips and evaluation segments."""

import itertools
import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tokenlearner_keras.data.clips import (
    LAST_SEGMENTS,
    SHORT_CLIPS,
    clip_indices,
    crop,
    segment_starts,
)
from tokenlearner_keras.data.video_records import VideoRecord, check_records
from tokenlearner_keras.data.videos import (
    VideoFaults,
    VideoReader,
    VideoReadError,
    clip_start,
)
from tokenlearner_keras.layers._checks import check_choice, check_positive_int

if TYPE_CHECKING:
    import tensorflow as tf

logger = logging.getLogger("tokenlearner_keras")

CLIP_LABELS = ("clip", "video")


def training_clips(
    records: Sequence[VideoRecord],
    num_classes: int,
    batch_size: int | None = None,
    clip_length: int = 64,
    size: tuple[int, int] = (224, 224),
    short_side: int | tuple[int, int] = 256,
    fps: float | None = None,
    multi_label: bool = True,
    clip_labels: str = "clip",
    short: str = "loop",
    flip: bool = True,
    shuffle: bool = True,
    seed: int | None = None,
    num_parallel_calls: int | None = None,
    faults: VideoFaults | None = None,
) -> "tf.data.Dataset":
    """Random clips for training: one of each video an epoch.

    A clip lies anywhere in its video, is resized, cropped at a random place and, half
    the time, mirrored; all its frames alike. A file that cannot be read is left out and
    named in `faults`; each epoch ends with a logged count.

    Args:
        records: The videos, from `read_video_folder`, `read_video_csv` or a builder.
        num_classes: int. Number of classes.
        batch_size: int. `None` does not batch.
        clip_length: int. Frames of a clip (the paper: 64).
        size: Height and width of the clips (the paper: 224 × 224).
        short_side: What the shorter side of a frame is resized to before the crop: one
            size, or a pair to draw from.
        fps: Frames a second (the paper, for Charades: 6 or 12). `None` takes the
            stored frames.
        multi_label: bool. Whether labels are vectors of zeros and ones, or one number.
        clip_labels: `"clip"`: the labels whose time overlaps the clip; `"video"`: all
            of the video. The same where labels have no times.
        short: What a video shorter than a clip does: `"loop"` or `"hold"`.
        flip: bool. Whether to mirror. Not for classes such as "left" and "right".
        shuffle: bool. Whether each epoch has a new order.
        seed: int. Seed of the order, the clips and the crops.
        num_parallel_calls: int. Files read at once. `None` lets `tf.data` choose.
        faults: Where faulty files are counted. `None` makes a new count.

    Returns:
        A `tf.data.Dataset` of `(clips, labels)`: `uint8` of shape
        `(batch_size, clip_length, *size, 3)` and `float32` of shape
        `(batch_size, num_classes)`, or `int32` of shape `(batch_size,)`.

    Raises:
        ValueError: if an argument or a label is out of range. At the end of an epoch in
            which no file could be read, the dataset ends with an error that says so.
    """
    import tensorflow as tf

    records = check_records(records, num_classes, multi_label)
    settings = _Settings(clip_length, size, short_side, fps, short)
    check_choice("clip_labels", clip_labels, CLIP_LABELS)
    watch = _Watch(records, faults)

    def load(index, random):
        record, rng = records[index], np.random.default_rng(int(random))
        try:
            clip, start, end = _random_clip(record.path, settings, rng, watch.faults)
        except VideoReadError as error:
            watch.fail(error)
            return settings.empty_clip, settings.empty_label(num_classes), False
        watch.delivered()
        if flip and rng.random() < 0.5:
            clip = clip[:, :, ::-1]
        times = (start, end) if clip_labels == "clip" else ()
        targets = record.targets(num_classes, *times)
        return np.ascontiguousarray(clip), targets, True

    def map_fn(index, random):
        clip, targets, is_read = tf.numpy_function(
            load, (index, random), (tf.uint8, tf.float32, tf.bool), stateful=True
        )
        clip = tf.ensure_shape(clip, (clip_length, *size, 3))
        targets = tf.ensure_shape(targets, (num_classes,))
        labels = targets if multi_label else tf.argmax(targets, output_type=tf.int32)
        return clip, labels, is_read

    dataset = tf.data.Dataset.range(len(records))
    if shuffle:
        dataset = dataset.shuffle(len(records), seed=seed)
    random = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True)
    dataset = tf.data.Dataset.zip((dataset, random)).map(
        map_fn, num_parallel_calls=num_parallel_calls or tf.data.AUTOTUNE
    )
    dataset = dataset.filter(lambda clip, labels, is_read: is_read)
    dataset = dataset.map(lambda clip, labels, is_read: (clip, labels))
    dataset = watch.at_the_end(dataset)
    if batch_size is not None:
        check_positive_int("batch_size", batch_size)
        dataset = dataset.batch(batch_size, drop_remainder=len(records) >= batch_size)
    return dataset.prefetch(tf.data.AUTOTUNE)


def evaluation_segments(
    records: Sequence[VideoRecord],
    num_classes: int,
    batch_size: int | None = None,
    clip_length: int = 64,
    size: tuple[int, int] = (256, 256),
    short_side: int = 256,
    fps: float | None = None,
    multi_label: bool = True,
    short: str = "loop",
    last: str = "shift",
    num_parallel_calls: int | None = None,
    faults: VideoFaults | None = None,
) -> "tf.data.Dataset":
    """The consecutive segments of every video, for evaluation.

    Frames are resized and the middle is cropped. Files are read in parallel and a
    segment at a time, so that memory does not grow with a video's length; the order is
    fixed. Merge a video's segments with `tokenlearner_keras.evaluation.merge_clips`.

    Args:
        records: The videos.
        num_classes: int. Number of classes.
        batch_size: int. Segments in a batch; `None` does not batch.
        clip_length: int. Frames of a segment (the paper: 64).
        size: Height and width of the segments (the paper: 256 × 256).
        short_side: int. What the shorter side of a frame is resized to.
        fps: Frames a second; `None` takes the stored frames.
        multi_label: bool. Whether labels are vectors of zeros and ones, or one number.
        short: What a video shorter than a segment does: `"loop"` or `"hold"`.
        last: What becomes of frames left over at the end: `"shift"`, `"pad"` or
            `"drop"`, see `segment_starts`.
        num_parallel_calls: int. Files read at once. `None` takes two.
        faults: Where faulty files are counted. `None` makes a new count.

    Returns:
        A `tf.data.Dataset` of dictionaries: `"clips"`, `uint8` of shape
        `(batch_size, clip_length, *size, 3)`; `"labels"`, of the whole video, as in
        `training_clips`; `"videos"`, `int64` of shape `(batch_size,)`, the index of the
        record.

    Raises:
        ValueError: as `training_clips`.
    """
    import tensorflow as tf

    records = check_records(records, num_classes, multi_label)
    check_choice("last", last, LAST_SEGMENTS)
    settings = _Settings(clip_length, size, short_side, fps, short)
    watch = _Watch(records, faults)

    def segments(index):
        record = records[index]
        try:
            for clip in _segments(record.path, settings, last, watch.faults):
                watch.delivered()
                yield clip, record.targets(num_classes), index
        except VideoReadError as error:
            watch.fail(error)

    def of_video(index):
        return tf.data.Dataset.from_generator(
            segments,
            args=(index,),
            output_signature=(
                tf.TensorSpec((clip_length, *size, 3), tf.uint8),
                tf.TensorSpec((num_classes,), tf.float32),
                tf.TensorSpec((), tf.int64),
            ),
        )

    def named(clip, targets, index):
        labels = targets if multi_label else tf.argmax(targets, output_type=tf.int32)
        return {"clips": clip, "labels": labels, "videos": index}

    dataset = tf.data.Dataset.range(len(records)).interleave(
        of_video,
        cycle_length=num_parallel_calls or 2,
        num_parallel_calls=num_parallel_calls or 2,
        deterministic=True,
    )
    dataset = watch.at_the_end(dataset.map(named))
    if batch_size is not None:
        check_positive_int("batch_size", batch_size)
        dataset = dataset.batch(batch_size)
    return dataset.prefetch(tf.data.AUTOTUNE)


class _Settings:
    """Checked arguments of a clip."""

    def __init__(self, clip_length, size, short_side, fps, short):
        self.clip_length = check_positive_int("clip_length", clip_length)
        self.size = tuple(check_positive_int("size", side) for side in size)
        if len(self.size) != 2:
            raise ValueError(
                f"Argument `size` must be (height, width). Received: size={size}"
            )
        sides = (short_side,) * 2 if isinstance(short_side, int) else short_side
        self.short_sides = tuple(check_positive_int("short_side", s) for s in sides)
        if self.short_sides[0] < max(self.size):
            raise ValueError(
                "Argument `short_side` must be at least the larger side of `size`, so "
                f"that the crop fits. Received: short_side={short_side}, size={size}"
            )
        if fps is not None and not fps > 0:
            raise ValueError(f"Argument `fps` must be over 0. Received: fps={fps}")
        self.fps = fps
        self.short = check_choice("short", short, SHORT_CLIPS)

    @property
    def empty_clip(self):
        return np.zeros((self.clip_length, *self.size, 3), "uint8")

    def empty_label(self, num_classes):
        return np.zeros(num_classes, "float32")


class _Watch:
    """Counts what a pass over the files delivers, and says so at its end."""

    def __init__(self, records, faults):
        self.num_files = len(records)
        self.faults = VideoFaults() if faults is None else faults
        self.num_clips = 0
        self._lock = threading.Lock()

    def delivered(self):
        with self._lock:
            self.num_clips += 1

    def fail(self, error):
        self.faults.add(error.path, error.kind, error.detail)

    def at_the_end(self, dataset):
        """`dataset`, with `_finish` run when it is exhausted."""
        import tensorflow as tf

        def finish(_):
            done = tf.numpy_function(self._finish, (), tf.bool, stateful=True)
            with tf.control_dependencies([done]):
                return tf.nest.map_structure(
                    lambda spec: tf.zeros(spec.shape, spec.dtype), dataset.element_spec
                )

        def never(*_):
            return tf.constant(False)

        end = tf.data.Dataset.from_tensors(0).map(finish).filter(never)
        return dataset.concatenate(end)

    def _finish(self):
        clips, self.num_clips = self.num_clips, 0
        if clips == 0:
            raise ValueError(
                f"None of the {self.num_files} video files could be read: "
                + self.faults.summary()
            )
        level = logging.WARNING if self.faults.files else logging.INFO
        logger.log(level, "%d clips delivered; %s", clips, self.faults.summary())
        return True


def _random_clip(path, settings, rng, faults):
    """Returns a clip and its start and end in seconds."""
    short_side = int(rng.integers(settings.short_sides[0], settings.short_sides[1] + 1))
    position, place = rng.random(), (rng.random(), rng.random())
    length = settings.clip_length
    with VideoReader(path, short_side) as reader:
        rate = settings.fps or reader.fps
        start = clip_start(reader.duration, length / rate, position)
        frames = _take(reader.frames(start, settings.fps), length)
        if reader.fault:
            faults.add(reader.path, *_split(reader.fault))
        if len(frames) < length and start > 0:
            # The file ends before it says: take the clip that ends with it.
            start = max(0.0, reader.end - (length + 0.5) / rate)
            frames = _take(reader.frames(start, settings.fps), length)
        if not frames:
            raise VideoReadError(reader.path, "no frames", reader.fault or "")
    times = [time for time, _ in frames]
    window = [crop(frame, settings.size, place) for _, frame in frames]
    indices = clip_indices(len(window), length, settings.short)
    return np.stack([window[i] for i in indices]), times[0], times[-1] + 1 / rate


def _take(frames, count):
    return list(itertools.islice(frames, count))


def _segments(path, settings, last, faults):
    """Yields the consecutive segments of a video; holds two of them at most."""
    length = settings.clip_length
    recent, count = deque(maxlen=length), 0
    with VideoReader(path, settings.short_sides[0]) as reader:
        for _, frame in reader.frames(0.0, settings.fps):
            # A copy: a view would keep the whole frame alive.
            recent.append(crop(frame, settings.size).copy())
            count += 1
            if count % length == 0:
                yield np.stack(recent)
        if reader.fault:
            faults.add(reader.path, *_split(reader.fault))
    if not count:
        raise VideoReadError(reader.path, "no frames", reader.fault or "")
    start = segment_starts(count, length, last)[-1]
    if start % length or count < length or (count % length and last == "pad"):
        # What is left over; whole segments went out above.
        rest = list(recent)[-(count - start) :]
        yield np.stack(
            [rest[i] for i in clip_indices(len(rest), length, settings.short)]
        )


def _split(fault):
    kind, _, detail = fault.partition(": ")
    return kind, detail
