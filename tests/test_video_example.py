import importlib.util
import json
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.data.video_files import real_clip

pytestmark = pytest.mark.tensorflow

SCRIPT = Path(__file__).parent.parent / "examples" / "train_video_classifier.py"
# Models and data that train in seconds.
SMALL = [
    *("--seeds", "1", "--epochs", "1", "--batch-size", "4"),
    *("--frames", "8", "--size", "32", "--tokens", "2"),
]


@pytest.fixture
def example():
    specification = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def read_picture(path):
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"), "float32")


@pytest.mark.parametrize(
    "modules",
    [
        ("conv2d+conv1d", "conv2d+token_learner"),
        pytest.param(("conv2d+temporal", "token_learner"), marks=pytest.mark.slow),
    ],
)
def test_whole_run_on_moving_digits(modules, example, tmp_path, capsys):
    import tensorflow as tf

    output = tmp_path / "out"
    arguments = ["--clips", "16", "--test-clips", "12", "--output", str(output)]
    rows = example.main([*SMALL, *arguments, "--modules", *modules])
    printed = capsys.readouterr().out
    assert [row["module"] for row in rows] == list(modules)
    for row in rows:
        assert row["module"] in printed
        assert 0 < row["map_mean"] <= 1
        assert row["map_mean"] == pytest.approx(np.mean(row["map"]))
        assert row["parameters"] > 1000
        assert 0 < row["module_gflops"] < row["gflops"]
        assert row["clips_per_second"] > 0
    for heading in ("mAP", "parameters", "GFLOPs module", "clips/s"):
        assert heading in printed
    assert json.loads((output / "metrics.json").read_text()) == rows
    strips = read_picture(output / "attention_maps.png")
    assert strips.std() > 10
    clips, _ = example.make_clips(example.load_objects("digits")[1], 3, 8, 32, seed=5)
    loaded = tf.saved_model.load(str(output / "saved_model"))
    serve = loaded.signatures["serving_default"]
    probabilities = serve(images=tf.constant(clips, tf.float32))[
        "probabilities"
    ].numpy()
    assert probabilities.shape == (3, len(example.MOTIONS))
    model = keras.saving.load_model(output / "model.keras")
    logits = np.asarray(model(clips))
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-5)


def test_token_learner_costs_less_than_the_convolution_over_time(example):
    arguments = example.parse_arguments([])
    costs = {m: example.module_flops(m, arguments) for m in example.MODULES}
    assert costs["conv2d+token_learner"] < costs["conv2d+conv1d"]


@pytest.mark.parametrize("motion", range(8))
def test_paths_are_what_their_motion_says(motion, example):
    rng = np.random.default_rng(0)
    way = list(example.STEPS)[motion % 4]
    step = np.array(example.STEPS[way])
    for _ in range(50):
        path = example.make_path(motion, 24, 32, rng)
        assert path.min() >= 0
        assert path.max() <= 32 - example.OBJECT
        along = (path - path[0]) @ step
        across = (path - path[0]) @ np.abs(step[::-1])
        assert not across.any()
        if "comes back" in example.MOTIONS[motion]:
            # To where it was, up to a step that was made before the first frame.
            assert abs(along[-1]) <= 4
            assert along.max() >= 10
            assert along.min() >= min(along[-1], 0) - 1
            # It waits away from its place.
            assert (along >= along.max() - 1).sum() >= 3
        else:
            assert along[-1] == along.max() >= 10
            assert (np.diff(along) >= 0).all()


def test_clips_hold_their_objects(example):
    train, test = example.load_objects("digits")
    assert train.shape[1:] == test.shape[1:] == (8, 8)
    clips, labels = example.make_clips(train, 60, 24, 32, seed=0)
    assert set(labels.sum(axis=1)) == {1, 2}
    assert (clips.reshape(60, 24, -1).max(axis=2) > 100).all()
    # With one object, every frame shows the same picture at another place.
    sums = clips[labels.sum(axis=1) == 1].astype(float).sum(axis=(2, 3, 4))
    np.testing.assert_allclose(sums, np.broadcast_to(sums[:, :1], sums.shape))
    again, _ = example.make_clips(train, 60, 24, 32, seed=0)
    np.testing.assert_array_equal(again, clips)


def test_fashion_mnist_where_present(example):
    if not example.FASHION_MNIST.exists():
        with pytest.raises(SystemExit, match="dataset-fashion-mnist"):
            example.load_objects("fashion_mnist")
        return
    train, test = example.load_objects("fashion_mnist")
    assert train.shape == (60000, 8, 8)
    assert test.shape == (10000, 8, 8)
    assert train.std() > 30


@pytest.mark.slow
def test_a_folder_of_real_videos(example, tmp_path, capsys):
    import shutil

    folder = tmp_path / "videos"
    for name, kind in [
        ("bikes", "outdoors"),
        ("bigbuckbunny", "drawn"),
        ("carphone_pristine", "indoors"),
        ("carphone_distorted", "indoors"),
    ]:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        shutil.copy(real_clip(name), folder / kind)
    (folder / "drawn" / "broken.mp4").write_bytes(b"no video")
    output = tmp_path / "out"
    (row,) = example.main(
        [
            *SMALL,
            *("--videos", str(folder), "--fps", "6", "--batch-size", "2"),
            *("--modules", "conv2d+token_learner", "--output", str(output)),
        ]
    )
    printed = capsys.readouterr().out
    assert "4 videos to train on, 1 to evaluate" in printed
    assert row["parameters"] > 1000
    names = (output / "saved_model" / "assets" / "class_names.txt").read_text()
    assert names.split() == ["drawn", "indoors", "outdoors"]
    assert read_picture(output / "attention_maps.png").std() > 10


def test_a_csv_of_real_videos(example, tmp_path):
    lines = ["path,labels", f"{real_clip('bikes')},moving;outdoors"]
    lines += [f"{real_clip('carphone_pristine')},talking", "lost.mp4,talking"]
    (tmp_path / "videos.csv").write_text("\n".join(lines) + "\n")
    arguments = example.parse_arguments(
        [*SMALL, "--csv", str(tmp_path / "videos.csv"), "--fps", "6"]
    )
    train, test, names, steps = example.open_videos(arguments)
    assert names == ["moving", "outdoors", "talking"]
    assert steps == 1
    assert sum(len(clips) for clips, _ in train) == 1
    labels = np.concatenate([np.asarray(batch["labels"]) for batch in test])
    assert labels.shape[1] == 3
