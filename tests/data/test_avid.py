import json
import os

import numpy as np
import pytest

from tests.data.video_files import ramp, write_video
from tokenlearner_keras.data.avid import NUM_CLASSES, read_avid, read_avid_classes
from tokenlearner_keras.data.videos import VideoFaults

TRAIN = {
    "aaaaaaaa.mp4": "origami",
    "bbbbbbbb.mp4": "archery",
    "cccccccc.mp4": "none",
    "lostlost.mp4": "surfing",
}
VAL = {"dddddddd.mp4": "archery"}


@pytest.fixture
def manual_dir(tmp_path):
    folder = tmp_path / "manual"
    folder.mkdir()
    (folder / "avid_train.json").write_text(json.dumps(TRAIN))
    (folder / "avid_val.json").write_text(json.dumps(VAL))
    for index, name in enumerate(["aaaaaaaa", "bbbbbbbb", "cccccccc", "dddddddd"]):
        write_video(folder / "AViD_small" / f"{name}.mp4", ramp(25 + index, step=1))
    return folder


def paths(folder):
    return [folder / "avid_train.json", folder / "avid_val.json"]


def test_annotations(manual_dir):
    names = read_avid_classes(*paths(manual_dir))
    assert names == ["archery", "none", "origami", "surfing"]
    faults = VideoFaults()
    records = read_avid(paths(manual_dir)[0], manual_dir / "AViD_small", names, faults)
    assert [(os.path.basename(r.path), r.labels) for r in records] == [
        ("aaaaaaaa.mp4", (2,)),
        ("bbbbbbbb.mp4", (0,)),
        ("cccccccc.mp4", (1,)),
    ]
    (lost,) = faults.files
    assert lost.endswith("lostlost.mp4")
    # Without the class "none", a video without a class is none at all.
    names.remove("none")
    records = read_avid(paths(manual_dir)[0], manual_dir / "AViD_small", names)
    assert [r.labels for r in records] == [(1,), (0,)]


def test_number_of_classes(manual_dir):
    train, val = paths(manual_dir)
    labels = ["none", *(f"class {i:03d}" for i in range(NUM_CLASSES))]
    train.write_text(json.dumps({f"{i}.mp4": name for i, name in enumerate(labels)}))
    val.write_text(json.dumps({"x.mp4": "class 000"}))
    assert read_avid_classes(train, val) == labels[1:]
    val.write_text(json.dumps({"x.mp4": "one more"}))
    with pytest.raises(ValueError, match=r"AViD has 887 classes. Received: 888 names"):
        read_avid_classes(train, val)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "one JSON object from file names to class names. Received: list"),
        ('{"a.mp4": 3}', "one JSON object"),
        ("{", "must be JSON"),
        ('{"a.mp4": "flying"}', "Unknown class of 'a.mp4'.*Received: 'flying'"),
        ('{"a.mp4": "archery"}', "names no file that exists. Received: 1 entries"),
    ],
)
def test_bad_files(text, message, tmp_path):
    (tmp_path / "avid.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_avid(tmp_path / "avid.json", tmp_path, ["archery"])


@pytest.mark.tensorflow
@pytest.mark.parametrize("own_names", [False, True])
def test_build(own_names, manual_dir, tmp_path):
    import tensorflow_datasets as tfds

    from tokenlearner_keras.data.avid import avid_dataset_builder

    if own_names:
        (manual_dir / "classes.txt").write_text("surfing\norigami\narchery\n")
    builder = avid_dataset_builder.Builder(data_dir=tmp_path / "data")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
    )
    label = builder.info.features["label"]
    assert label.num_classes == 887
    examples = {
        example["id"].decode(): example
        for split in ("train", "test")
        for example in builder.as_dataset(split).as_numpy_iterator()
    }
    assert builder.faults.counts() == {"missing": 1}
    names = {key: label.int2str(int(e["label"])) for key, e in examples.items()}
    expected = {"aaaaaaaa": "origami", "bbbbbbbb": "archery", "dddddddd": "archery"}
    if own_names:
        assert examples["aaaaaaaa"]["label"] == 1
    else:
        expected["cccccccc"] = "none"
    assert names == expected
    assert examples["aaaaaaaa"]["video"].shape == (12, 256, 341, 3)
    assert np.ptp(examples["aaaaaaaa"]["video"].mean(axis=(1, 2, 3))) > 15


@pytest.mark.tensorflow
def test_build_without_the_files_says_what_is_wanted(tmp_path):
    import tensorflow_datasets as tfds

    from tokenlearner_keras.data.avid import avid_dataset_builder

    (tmp_path / "manual" / "videos").mkdir(parents=True)
    builder = avid_dataset_builder.Builder(data_dir=tmp_path / "data")
    with pytest.raises(
        ValueError,
        match=r"`manual_dir` must hold the annotations: one of \('avid_train",
    ):
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=tmp_path / "manual")
        )
