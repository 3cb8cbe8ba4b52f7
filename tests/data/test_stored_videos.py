import numpy as np
import pytest

from tests.data.test_avid import manual_dir as avid_dir  # noqa: F401 (a fixture)
from tests.data.test_charades import manual_dir  # noqa: F401 (a fixture)
from tokenlearner_keras.data.stored_videos import (
    stored_evaluation_segments,
    stored_training_clips,
)

pytestmark = pytest.mark.tensorflow


def prepare(module, folder, tmp_path, **kwargs):
    import tensorflow_datasets as tfds

    builder = module.Builder(data_dir=tmp_path / "data", **kwargs)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=folder)
    )
    # As a user does who has the prepared files alone.
    return tfds.builder_from_directory(builder.data_dir)


@pytest.fixture
def charades(manual_dir, tmp_path):  # noqa: F811
    from tokenlearner_keras.data.charades import charades_dataset_builder

    return prepare(charades_dataset_builder, manual_dir, tmp_path, config="12fps")


def test_training_clips_of_charades(charades):
    # AAAAA: 48 frames at 12 a second; c092 to 1.5 s, c147 from 1 s on. BBBBB: 24, none.
    dataset = stored_training_clips(charades, clip_length=6, size=(32, 40), seed=0)
    starts = set()
    for clip, label in dataset.repeat(20).as_numpy_iterator():
        assert clip.shape == (6, 32, 40, 3)
        assert clip.dtype == np.uint8
        greys = clip.mean(axis=(1, 2, 3)) - 16
        assert greys[-1] - greys[0] == pytest.approx(5 * 25 / 12, abs=2)
        present = set(np.flatnonzero(label))
        if 147 in present or 92 in present:
            start = greys[0] / 25
            starts.add(round(start, 1))
            assert (92 in present) == (start <= 1.5) or abs(start - 1.5) < 0.1
            assert (147 in present) == (start + 0.5 >= 1) or abs(start - 0.5) < 0.1
    assert len(starts) > 5
    whole = stored_training_clips(
        charades, clip_length=6, size=(32, 32), clip_labels="video"
    )
    labels = [label for _, label in whole.as_numpy_iterator()]
    assert sorted(label.sum() for label in labels) == [0, 2]


def test_short_clips_and_batches(charades):
    dataset = stored_training_clips(charades, "train", 2, 60, (32, 32), short="hold")
    ((clips, labels),) = dataset.as_numpy_iterator()
    assert clips.shape == (2, 60, 32, 32, 3)
    assert labels.shape == (2, 157)
    np.testing.assert_array_equal(clips[:, -1], clips[:, -12])


@pytest.mark.parametrize(
    ("last", "starts"),
    [("shift", [0, 20, 28]), ("pad", [0, 20, 40]), ("drop", [0, 20])],
)
def test_evaluation_segments_of_charades(last, starts, charades):
    dataset = stored_evaluation_segments(
        charades, "train", 2, 20, (32, 32), short="hold", last=last
    )
    batches = list(dataset.as_numpy_iterator())
    joined = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    longest = joined["labels"].sum(axis=1) == 2
    greys = joined["clips"][longest].mean(axis=(2, 3, 4)) - 16
    assert len(greys) == len(starts)
    for grey, start in zip(greys, starts, strict=True):
        indices = np.minimum(start + np.arange(20), 47)
        np.testing.assert_allclose(grey, np.floor(indices * 25 / 12), atol=2)
    assert len(set(joined["videos"][longest])) == 1
    assert set(joined["videos"]) == {0, 1}


def test_single_label(avid_dir, tmp_path):  # noqa: F811
    from tokenlearner_keras.data.avid import avid_dataset_builder

    builder = prepare(avid_dataset_builder, avid_dir, tmp_path)
    dataset = stored_training_clips(builder, clip_length=8, size=(32, 32))
    labels = [int(label) for _, label in dataset.as_numpy_iterator()]
    assert sorted(labels) == [0, 1, 2]
    (segment,) = stored_evaluation_segments(
        builder, clip_length=12, size=(64, 64), last="drop"
    ).as_numpy_iterator()
    assert segment["clips"].shape == (12, 64, 64, 3)
    assert segment["labels"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_length": 0}, "`clip_length`"),
        ({"short": "mirror"}, "Received: short='mirror'"),
        ({"clip_labels": "frame"}, "Received: clip_labels='frame'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        stored_training_clips(None, **arguments)
    with pytest.raises(ValueError, match="Received: last='wrap'"):
        stored_evaluation_segments(None, last="wrap")
