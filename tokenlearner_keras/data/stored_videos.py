"""`tf.data` pipelines from the TFDS builders `charades` and `avid`."""

from typing import TYPE_CHECKING

from tokenlearner_keras.data.clips import LAST_SEGMENTS, SHORT_CLIPS
from tokenlearner_keras.data.video_dataset import CLIP_LABELS
from tokenlearner_keras.layers._checks import check_choice, check_positive_int

if TYPE_CHECKING:
    import tensorflow as tf


def stored_training_clips(
    builder,
    split: str = "train",
    batch_size: int | None = None,
    clip_length: int = 64,
    size: tuple[int, int] = (224, 224),
    clip_labels: str = "clip",
    short: str = "loop",
    flip: bool = True,
    shuffle_buffer: int = 256,
    seed: int | None = None,
) -> "tf.data.Dataset":
    """Random clips of a prepared builder: one of each video an epoch.

    Frames are stored as JPEG: only those of the clip are decoded. Crops and mirrors
    are as in `training_clips`.

    Args:
        builder: A prepared TFDS builder with the features `"video"` and either
            `"labels"` with `"actions"` (Charades) or `"label"` (AViD); see
            `tfds.builder_from_directory`.
        split: Name of the split.
        batch_size: int. `None` does not batch.
        clip_length: int. Frames of a clip.
        size: Height and width; at most the stored ones.
        clip_labels: `"clip"`: the actions that overlap the clip; `"video"`: all.
        short: What a video shorter than a clip does: `"loop"` or `"hold"`.
        flip: bool. Whether to mirror half of the clips.
        shuffle_buffer: int. Stored videos to shuffle among; 0 keeps the order.
        seed: int. Seed of the order, the clips and the crops.

    Returns:
        A `tf.data.Dataset` of `(clips, labels)`, as that of `training_clips`.
    """
    import tensorflow as tf

    check_positive_int("clip_length", clip_length)
    check_choice("clip_labels", clip_labels, CLIP_LABELS)
    check_choice("short", short, SHORT_CLIPS)
    fps = float(builder.info.metadata["fps"])
    dataset = _encoded(builder, split, shuffle_files=shuffle_buffer > 0)
    if shuffle_buffer:
        dataset = dataset.shuffle(shuffle_buffer, seed=seed)

    def clip_of(example, random):
        seeds = tf.random.split(tf.stack([random, 0]), 3)
        frames = example["video"]
        room = tf.maximum(tf.shape(frames)[0] - clip_length, 0)
        start = tf.random.stateless_uniform((), seeds[0], 0, room + 1, dtype=tf.int32)
        clip = _decode(_clip(frames[start:], clip_length, short))
        clip = tf.image.stateless_random_crop(clip, (clip_length, *size, 3), seeds[1])
        if flip:
            # One draw for the clip, not one for each frame.
            mirrored = tf.random.stateless_uniform((), seeds[2]) < 0.5
            clip = tf.where(mirrored, tf.reverse(clip, [2]), clip)
        times = None
        if clip_labels == "clip":
            times = tf.cast(tf.stack([start, start + clip_length]), tf.float32) / fps
        return clip, _labels(example, builder, times)

    random = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True)
    dataset = tf.data.Dataset.zip((dataset, random)).map(
        clip_of, num_parallel_calls=tf.data.AUTOTUNE
    )
    if batch_size is not None:
        check_positive_int("batch_size", batch_size)
        dataset = dataset.batch(batch_size, drop_remainder=True)
    return dataset.prefetch(tf.data.AUTOTUNE)


def stored_evaluation_segments(
    builder,
    split: str = "test",
    batch_size: int | None = None,
    clip_length: int = 64,
    size: tuple[int, int] = (256, 256),
    short: str = "loop",
    last: str = "shift",
) -> "tf.data.Dataset":
    """The consecutive segments of every video of a prepared builder.

    Args:
        builder: A prepared TFDS builder, see `stored_training_clips`.
        split: Name of the split.
        batch_size: int. Segments in a batch; `None` does not batch.
        clip_length: int. Frames of a segment.
        size: Height and width of the middle crop.
        short: What a video shorter than a segment does: `"loop"` or `"hold"`.
        last: What becomes of frames left over: `"shift"`, `"pad"` or `"drop"`.

    Returns:
        A `tf.data.Dataset` of dictionaries, as that of `evaluation_segments`;
        `"videos"` counts the stored videos from 0.
    """
    import tensorflow as tf

    check_positive_int("clip_length", clip_length)
    check_choice("short", short, SHORT_CLIPS)
    check_choice("last", last, LAST_SEGMENTS)

    def of_video(index, example):
        frames = example["video"]
        count = tf.shape(frames)[0]
        starts = tf.range(0, tf.maximum(count - clip_length, 0) + 1, clip_length)
        rest = count % clip_length
        if last != "drop":
            extra = count - (clip_length if last == "shift" else rest)
            is_extra = tf.logical_and(rest > 0, count > clip_length)
            starts = tf.cond(
                is_extra, lambda: tf.concat([starts, [extra]], 0), lambda: starts
            )
        labels = _labels(example, builder, None)

        def segment(start):
            clip = _decode(_clip(frames[start:], clip_length, short))
            return {
                "clips": _middle(clip, size),
                "labels": labels,
                "videos": index,
            }

        return tf.data.Dataset.from_tensor_slices(starts).map(segment)

    dataset = _encoded(builder, split).enumerate()
    dataset = dataset.interleave(
        of_video, cycle_length=2, num_parallel_calls=2, deterministic=True
    )
    if batch_size is not None:
        check_positive_int("batch_size", batch_size)
        dataset = dataset.batch(batch_size)
    return dataset.prefetch(tf.data.AUTOTUNE)


def _encoded(builder, split, shuffle_files=False):
    """Examples whose `"video"` is a vector of JPEG files."""
    import tensorflow_datasets as tfds

    return builder.as_dataset(
        split,
        decoders={"video": tfds.decode.SkipDecoding()},
        shuffle_files=shuffle_files,
    )


def _clip(frames, clip_length, short):
    import tensorflow as tf

    count, indices = tf.shape(frames)[0], tf.range(clip_length)
    if short == "loop":
        return tf.gather(frames, indices % count)
    return tf.gather(frames, tf.minimum(indices, count - 1))


def _decode(frames):
    import tensorflow as tf

    return tf.map_fn(
        lambda frame: tf.io.decode_jpeg(frame, channels=3),
        frames,
        fn_output_signature=tf.TensorSpec((None, None, 3), tf.uint8),
    )


def _middle(clip, size):
    import tensorflow as tf

    top, left = ((tf.shape(clip)[axis + 1] - size[axis]) // 2 for axis in range(2))
    clip = clip[:, top : top + size[0], left : left + size[1]]
    return tf.ensure_shape(clip, (None, *size, 3))


def _labels(example, builder, times):
    """Zeros and ones of a multi-label example, or the number of a single label."""
    import tensorflow as tf

    if "label" in example:
        return tf.cast(example["label"], tf.int32)
    if times is None:
        return tf.cast(example["labels"], tf.float32)
    actions = example["actions"]
    num_classes = builder.info.features["labels"].shape[0]
    overlaps = tf.logical_and(actions["start"] <= times[1], actions["end"] >= times[0])
    hot = tf.one_hot(actions["label"], num_classes)
    return tf.minimum(tf.reduce_sum(tf.where(overlaps[:, None], hot, 0.0), axis=0), 1.0)
