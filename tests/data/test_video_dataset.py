import logging
from collections import Counter

import keras
import numpy as np
import pytest

from tests.data.video_files import (
    cut,
    ramp,
    real_clip,
    write_faulty_files,
    write_video,
)
from tokenlearner_keras.data.video_dataset import evaluation_segments, training_clips
from tokenlearner_keras.data.video_records import VideoRecord
from tokenlearner_keras.data.videos import VideoFaults
from tokenlearner_keras.evaluation import merge_clips

pytestmark = pytest.mark.tensorflow
SMALL = {"size": (32, 32), "short_side": 32}


@pytest.fixture
def records(tmp_path):
    """Videos of 10, 40, 64 and 150 frames; classes 0 to 3."""
    return [
        VideoRecord(write_video(tmp_path / f"{n}.mp4", ramp(n, step=1)), (i,))
        for i, n in enumerate((10, 40, 64, 150))
    ]


def read_all(dataset):
    return list(dataset.as_numpy_iterator())


def test_training_clips(records):
    dataset = training_clips(records, 4, 2, clip_length=16, seed=0, **SMALL)
    batches = read_all(dataset)
    assert len(batches) == 2
    for clips, labels in batches:
        assert clips.shape == (2, 16, 32, 32, 3)
        assert clips.dtype == np.uint8
        assert labels.shape == (2, 4)
        assert labels.dtype == np.float32
        for clip, label in zip(clips, labels):
            greys = clip.mean(axis=(1, 2, 3))
            steps = np.diff(greys)
            if label[0]:  # 10 frames: looped
                assert (steps < -5).sum() == 1
            else:
                assert (greys[-1] - greys[0]) == pytest.approx(15, abs=1.5)
    labels = np.concatenate([labels for _, labels in batches])
    assert labels.sum(axis=0).tolist() == [1, 1, 1, 1]


def test_clips_lie_anywhere_and_the_seed_repeats_them(records):
    def starts(seed, epochs=12):
        dataset = training_clips(
            records[-1:], 4, clip_length=16, seed=seed, shuffle=False, **SMALL
        )
        clips = read_all(dataset.repeat(epochs))
        return [float(clip[0].mean()) - 16 for clip, _ in clips]

    first = starts(3)
    assert len({round(start) for start in first}) > 6
    assert min(first) < 45
    assert max(first) > 90
    assert max(first) < 136
    assert starts(3) == first
    assert starts(4) != first


def test_crops_and_mirrors_are_those_of_the_whole_clip(tmp_path):
    # A gradient to the right: where a crop lies and whether it is mirrored is seen.
    frames = ramp(20, 48, 96, step=0)
    frames[:] = (40 + 2 * np.arange(96))[None, None, :, None]
    path = write_video(tmp_path / "video.mp4", frames)
    dataset = training_clips(
        [VideoRecord(path, (0,))], 1, clip_length=8, size=(32, 32), short_side=(32, 48)
    )
    slopes, widths = Counter(), []
    for clip, _ in read_all(dataset.repeat(40)):
        line = clip.astype(float).mean(axis=(1, 3))
        np.testing.assert_allclose(line, np.broadcast_to(line[0], line.shape), atol=3)
        slope = line[0, -1] - line[0, 0]
        slopes[slope > 0] += 1
        widths.append(abs(slope))
    assert min(slopes[True], slopes[False]) >= 8
    # A short side drawn from 32 to 48 is a zoom of 1 to 1.5.
    assert max(widths) > 1.3 * min(widths)
    still = training_clips(
        [VideoRecord(path, (0,))], 1, clip_length=8, flip=False, **SMALL
    )
    for clip, _ in read_all(still.repeat(10)):
        assert clip[0, :, -1].mean() > clip[0, :, 0].mean()


def test_labels_of_the_clip_or_of_the_video(tmp_path):
    path = write_video(tmp_path / "video.mp4", ramp(100, step=1))  # 4 seconds
    record = VideoRecord(path, (0, 1, 2), ((0.0, 1.0), (3.0, 4.0), (0.0, 4.0)))

    def labels(**kwargs):
        dataset = training_clips([record], 3, clip_length=16, fps=25, **SMALL, **kwargs)
        return [
            (float(clip[0].mean()) - 16, label.tolist())
            for clip, label in read_all(dataset.repeat(25))
        ]

    of_clips = labels()
    for start, label in of_clips:
        if start < 23:
            assert label == [1, 0, 1]
        elif 29 < start < 56:
            assert label == [0, 0, 1]
        elif start > 63:
            assert label == [0, 1, 1]
    assert {tuple(label) for _, label in of_clips} >= {(1, 0, 1), (0, 0, 1)}
    assert all(label == [1, 1, 1] for _, label in labels(clip_labels="video"))


def test_single_label(records):
    dataset = training_clips(records, 4, 4, 8, multi_label=False, **SMALL)
    ((_, labels),) = read_all(dataset)
    assert labels.dtype == np.int32
    assert sorted(labels) == [0, 1, 2, 3]
    (batch,) = read_all(
        evaluation_segments(
            records[:1], 4, 4, 8, multi_label=False, last="drop", **SMALL
        )
    )
    assert batch["labels"].tolist() == [0]


@pytest.mark.parametrize(
    ("last", "starts"),
    [
        ("shift", {0: [0], 1: [0, 8], 2: [0, 32], 3: [0, 32, 64, 96, 118]}),
        ("pad", {0: [0], 1: [0, 32], 2: [0, 32], 3: [0, 32, 64, 96, 128]}),
        ("drop", {0: [0], 1: [0], 2: [0, 32], 3: [0, 32, 64, 96]}),
    ],
)
def test_evaluation_segments(last, starts, records):
    dataset = evaluation_segments(
        records, 4, 3, clip_length=32, last=last, short="hold", **SMALL
    )
    batches = read_all(dataset)
    joined = {
        key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]
    }
    assert joined["clips"].shape[1:] == (32, 32, 32, 3)
    lengths = (10, 40, 64, 150)
    for video, expected in starts.items():
        clips = joined["clips"][joined["videos"] == video]
        greys = clips.mean(axis=(2, 3, 4)) - 16
        assert len(clips) == len(expected)
        for grey, start in zip(greys, expected, strict=True):
            indices = np.minimum(start + np.arange(32), lengths[video] - 1)
            np.testing.assert_allclose(grey, indices, atol=2)
    np.testing.assert_array_equal(joined["labels"].argmax(axis=1), joined["videos"])
    again = np.concatenate([batch["videos"] for batch in read_all(dataset)])
    np.testing.assert_array_equal(again, joined["videos"])


def test_segments_at_a_rate(records):
    # 150 frames at 25 frames a second are 36 at 6.
    (batch,) = read_all(
        evaluation_segments(records[3:], 4, 8, clip_length=18, fps=6, **SMALL)
    )
    greys = batch["clips"].mean(axis=(2, 3, 4)).reshape(-1) - 16
    np.testing.assert_allclose(greys, np.floor(np.arange(36) * 25 / 6 + 1e-6), atol=2)


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_faulty_files_are_named_and_counted(kind, records, tmp_path, caplog):
    faulty = write_faulty_files(tmp_path)
    truncated = cut(records[3].path, tmp_path / "cut.mp4", 0.5)
    everything = [
        *[VideoRecord(path, (0,)) for path in faulty],
        *records,
        VideoRecord(truncated, (3,)),
    ]
    faults = VideoFaults()
    arguments = {"clip_length": 16, "faults": faults, **SMALL}
    if kind == "training":
        dataset = training_clips(everything, 4, **arguments)
        expected = 5
    else:
        dataset = evaluation_segments(everything, 4, **arguments)
        expected = 1 + 3 + 4 + 10
    for _ in range(2):  # each epoch alike
        caplog.clear()
        with caplog.at_level(logging.INFO, "tokenlearner_keras"):
            elements = read_all(dataset)
        if kind == "training":
            assert len(elements) == expected
        else:
            assert len(elements) > expected
        last = caplog.messages[-1]
        assert last.startswith(f"{len(elements)} clips delivered; ")
    assert set(faulty) <= set(faults.files)
    assert faults.counts()["missing"] == 1
    assert faults.counts()["no frames"] == 1
    if kind == "evaluation":
        assert faults.files[truncated][0] == "truncated"
        assert "7 faulty video files" in last


def test_a_clip_that_would_start_past_a_truncated_end(tmp_path):
    path = write_video(tmp_path / "video.mp4", ramp(150, step=1))
    short = cut(path, tmp_path / "cut.mp4", 0.5)
    faults = VideoFaults()
    dataset = training_clips(
        [VideoRecord(short, (0,))], 1, clip_length=16, faults=faults, **SMALL
    )
    for clip, _ in read_all(dataset.repeat(15)):
        greys = clip.mean(axis=(1, 2, 3))
        # Still one run of consecutive frames.
        assert greys[-1] - greys[0] == pytest.approx(15, abs=3)
    assert faults.files[short][0] == "truncated"


@pytest.mark.parametrize("make", [training_clips, evaluation_segments])
def test_no_readable_file_at_all_is_an_error(make, tmp_path):
    import tensorflow as tf

    records = [VideoRecord(str(tmp_path / f"{i}.mp4"), (0,)) for i in range(3)]
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match="None of the 3 video files could be read: 3 faulty video files",
    ):
        read_all(make(records, 1, clip_length=4, **SMALL))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "labels \\(1,\\) of"),
        ({"size": (64, 64)}, "short_side=32, size=\\(64, 64\\)"),
        ({"size": (8, 8, 8)}, "must be \\(height, width\\)"),
        ({"clip_length": 0}, "`clip_length`"),
        ({"fps": 0}, "Received: fps=0"),
        ({"short": "mirror"}, "Received: short='mirror'"),
        ({"clip_labels": "frame"}, "Received: clip_labels='frame'"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"multi_label": False, "records": [VideoRecord("a", ())]}, "must have one"),
    ],
)
def test_bad_arguments(arguments, message):
    records = [VideoRecord("a.mp4", (1,))]
    with pytest.raises(ValueError, match=message):
        training_clips(**{"records": records, "num_classes": 2, **SMALL, **arguments})
    if arguments.keys() <= {"num_classes", "size", "clip_length", "fps", "short"}:
        with pytest.raises(ValueError, match=message):
            evaluation_segments(
                **{"records": records, "num_classes": 2, **SMALL, **arguments}
            )


def test_real_clips_into_a_model():
    records = [
        VideoRecord(real_clip(name), (index,))
        for index, name in enumerate(("bikes", "bigbuckbunny", "carphone_pristine"))
    ]
    model = keras.Sequential(
        [
            keras.Input((16, 32, 32, 3)),
            keras.layers.Rescaling(1 / 127.5, offset=-1),
            keras.layers.Conv3D(4, 3, strides=2, activation="relu"),
            keras.layers.GlobalAveragePooling3D(),
            keras.layers.Dense(3, activation="sigmoid"),
        ]
    )
    model.compile("adam", "binary_crossentropy")
    arguments = {"clip_length": 16, "fps": 6, "size": (32, 32), "short_side": 40}
    history = model.fit(training_clips(records, 3, 3, **arguments), epochs=2, verbose=0)
    assert np.all(np.isfinite(history.history["loss"]))
    segments = evaluation_segments(records, 3, 4, **arguments)
    scores, videos = [], []
    for batch in segments:
        scores.append(model.predict_on_batch(batch["clips"]))
        videos.append(batch["videos"])
    videos = np.concatenate(videos)
    # 10.0, 5.3 and 4.0 seconds at 6 frames a second.
    assert Counter(videos.tolist()) == {0: 4, 1: 2, 2: 2}
    merged = merge_clips(np.concatenate(scores), videos)
    assert merged.shape == (3, 3)
    assert np.all((merged > 0) & (merged < 1))
