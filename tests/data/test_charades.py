import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.video_files import cut, ramp, write_video
from tokenlearner_keras.data.charades import (
    NUM_CLASSES,
    read_charades,
    read_charades_classes,
)
from tokenlearner_keras.data.videos import VideoFaults

HEADER = (
    "id,subject,scene,quality,relevance,verified,script,objects,descriptions,"
    "actions,length"
)


def row(name, actions):
    return f'{name},S1,Kitchen,6,7,Yes,"A person, sitting.",chair,"Sits; reads.",{actions},4.0'


def write_annotations(folder, **rows):
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in rows.items():
        text = "\n".join([HEADER, *(row(*line) for line in lines)])
        (folder / f"Charades_v1_{split}.csv").write_text(text + "\n")
    classes = "\n".join(f"c{i:03d} Doing thing {i}" for i in range(NUM_CLASSES))
    (folder / "Charades_v1_classes.txt").write_text(classes + "\n")


@pytest.fixture
def manual_dir(tmp_path):
    folder = tmp_path / "manual"
    write_annotations(
        folder,
        train=[
            ("AAAAA", "c092 0.00 1.50;c147 1.00 4.00"),
            ("BBBBB", ""),
            ("LOST1", "c000 0.00 1.00"),
            ("EMPTY", "c000 0.00 1.00"),
        ],
        test=[("CCCCC", "c156 2.00 1.00"), ("CUT01", "c001 0.00 2.00")],
    )
    videos = folder / "Charades_v1_480"
    write_video(videos / "AAAAA.mp4", ramp(100, step=1))
    write_video(videos / "BBBBB.mp4", ramp(50, step=1))
    write_video(videos / "CCCCC.mp4", ramp(75, step=1))
    cut(write_video(tmp_path / "x.mp4", ramp(100)), videos / "CUT01.mp4", 0.5)
    (videos / "EMPTY.mp4").write_bytes(b"")
    return folder


def test_annotations(manual_dir):
    faults = VideoFaults()
    videos = manual_dir / "Charades_v1_480"
    records = read_charades(manual_dir / "Charades_v1_train.csv", videos, faults)
    assert [os.path.basename(r.path) for r in records] == [
        "AAAAA.mp4",
        "BBBBB.mp4",
        "EMPTY.mp4",
    ]
    assert records[0].labels == (92, 147)
    assert records[0].spans == ((0.0, 1.5), (1.0, 4.0))
    assert np.flatnonzero(records[0].targets(157)).tolist() == [92, 147]
    assert np.flatnonzero(records[0].targets(157, 2.0, 3.0)).tolist() == [147]
    assert not records[1].targets(157).any()
    assert faults.counts() == {"missing": 1}
    (lost,) = faults.files
    assert lost.endswith("LOST1.mp4")
    assert faults.files[lost][1].endswith("Charades_v1_train.csv', line 4")
    # Start and end in the wrong order.
    (last, _) = read_charades(manual_dir / "Charades_v1_test.csv", videos)
    assert last.spans == ((1.0, 2.0),)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ("c157 0.0 1.0", "from c000 to c156. Received: 'c157 0.0 1.0'"),
        ("c-01 0.0 1.0", "from c000 to c156"),
        ("c001 0.0", "must be '<class> <start> <end>'.*Received: 'c001 0.0'"),
        ("c001 a b", "line 2, video 'AAAAA'"),
    ],
)
def test_bad_actions(actions, message, manual_dir):
    write_annotations(manual_dir, train=[("AAAAA", actions)])
    with pytest.raises(ValueError, match=message):
        read_charades(
            manual_dir / "Charades_v1_train.csv", manual_dir / "Charades_v1_480"
        )


def test_bad_files(manual_dir, tmp_path):
    with pytest.raises(
        ValueError, match=r"names no file that exists. Received: 4 rows"
    ):
        read_charades(manual_dir / "Charades_v1_train.csv", tmp_path)
    path = tmp_path / "classes.txt"
    path.write_text("c000 Sitting\nc002 Standing\n")
    with pytest.raises(ValueError, match=r"Line 2 of .* must be 'c001 <name>'"):
        read_charades_classes(path)
    path.write_text("c000 Sitting\n")
    with pytest.raises(ValueError, match=r"must name 157 classes. Received: 1"):
        read_charades_classes(path)
    path.write_text("name\nx\n")
    with pytest.raises(ValueError, match=r"`id` and `actions`. Received: \['name'\]"):
        read_charades(path, tmp_path)


@pytest.mark.tensorflow
@pytest.mark.parametrize(("config", "fps"), [("12fps", 12), ("6fps", 6)])
def test_build(config, fps, manual_dir, tmp_path, caplog):
    import tensorflow_datasets as tfds

    from tokenlearner_keras.data.charades import charades_dataset_builder

    builder = charades_dataset_builder.Builder(
        config=config, data_dir=tmp_path / "data"
    )
    with caplog.at_level(logging.INFO, "tokenlearner_keras"):
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
        )
    assert builder.info.splits["train"].num_examples == 2
    assert builder.info.splits["test"].num_examples == 2
    assert builder.faults.counts() == {"missing": 1, "unreadable": 1, "truncated": 1}
    assert any("videos stored; 3 faulty video files" in m for m in caplog.messages)
    assert builder.info.features["actions"]["label"].names[3] == "Doing thing 3"
    examples = {
        example["id"].decode(): example
        for split in ("train", "test")
        for example in builder.as_dataset(split).as_numpy_iterator()
    }
    first = examples["AAAAA"]
    assert first["video"].shape == (4 * fps, 256, 341, 3)
    assert first["duration"] == 4.0
    greys = first["video"].mean(axis=(1, 2, 3)) - 16
    np.testing.assert_allclose(greys, np.floor(np.arange(4 * fps) * 25 / fps), atol=2)
    assert np.flatnonzero(first["labels"]).tolist() == [92, 147]
    assert first["actions"]["label"].tolist() == [92, 147]
    assert first["actions"]["end"].tolist() == [1.5, 4.0]
    assert len(examples["BBBBB"]["actions"]["label"]) == 0
    assert 0 < len(examples["CUT01"]["video"]) < 4 * fps
    # Loads again without the code or the files.
    again = tfds.builder_from_directory(builder.data_dir)
    assert again.info.metadata["fps"] == fps
    assert len(list(again.as_dataset("train"))) == 2


@pytest.mark.tensorflow
def test_build_stops_at_a_wrong_label_before_decoding(manual_dir, tmp_path):
    import tensorflow_datasets as tfds

    from tokenlearner_keras.data.charades import charades_dataset_builder

    write_annotations(manual_dir, test=[("CCCCC", "c157 0.00 1.00")])
    builder = charades_dataset_builder.Builder(data_dir=tmp_path / "data")
    with pytest.raises(ValueError, match="from c000 to c156"):
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
        )


# What `tfds build` runs; its own entry point wants apache-beam for other commands.
TFDS_BUILD = """
import sys
from tensorflow_datasets.scripts.cli import build, cli_utils

parse = cli_utils.make_flags_parser(build.Args, description="Builds a dataset.")
parse(["build", *sys.argv[1:]]).execute()
"""


@pytest.mark.tensorflow
def test_build_from_the_command_line(manual_dir, tmp_path):
    from tokenlearner_keras.data import charades

    result = subprocess.run(
        [
            *(sys.executable, "-c", TFDS_BUILD, "--config", "6fps"),
            *("--manual_dir", str(manual_dir), "--data_dir", str(tmp_path / "data")),
        ],
        cwd=Path(charades.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (info,) = (tmp_path / "data").glob("charades/6fps/*/dataset_info.json")
    splits = {
        split["name"]: split["shardLengths"]
        for split in json.loads(info.read_text())["splits"]
    }
    assert splits == {"train": ["2"], "test": ["2"]}
