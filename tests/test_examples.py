import csv
import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.tensorflow

EXAMPLES = Path(__file__).parent.parent / "examples"
IMAGE_SCRIPT = EXAMPLES / "train_image_classifier.py"
# A model that trains in seconds.
SMALL = [
    "--epochs",
    "2",
    "--batch-size",
    "256",
    "--patch-size",
    "4",
    "--hidden-dim",
    "16",
    "--num-layers",
    "2",
    "--num-heads",
    "2",
    "--mlp-dim",
    "16",
    "--num-tokens",
    "4",
]


def load_example(path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def images():
    return load_example(IMAGE_SCRIPT)


def read_history(output):
    with open(output / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_image_classifier_writes_everything(images, tmp_path, capsys):
    import tensorflow as tf
    from PIL import Image

    from tokenlearner_keras.data import load_image_dataset

    output = tmp_path / "run"
    metrics = images.main([*SMALL, "--output", str(output)])
    printed = capsys.readouterr().out
    assert "Epoch 1/2" in printed
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert table[0] == ("| model | parameters | GFLOPs | images/s | test accuracy |")
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "ViT",
        "TokenLearner ViT",
    ]
    assert {path.name for path in output.iterdir()} == {
        "model.keras",
        "saved_model",
        "attention_maps.png",
        "history.csv",
        "metrics.json",
        "settings.json",
        "vit",
        "token_learner_vit",
    }
    assert (
        json.loads((output / "metrics.json").read_text())["models"] == metrics["models"]
    )
    plain, learned = metrics["models"]["vit"], metrics["models"]["token_learner_vit"]
    # The TokenLearner adds its convolutions and saves more than they cost.
    assert learned["parameters"] > plain["parameters"]
    assert learned["gflops"] < plain["gflops"]
    assert learned["images_per_second"] > 0
    rows = read_history(output)
    assert [(row["model"], row["epoch"]) for row in rows] == [
        ("vit", "0"),
        ("vit", "1"),
        ("token_learner_vit", "0"),
        ("token_learner_vit", "1"),
    ]
    assert all(0 <= float(row["val_accuracy"]) <= 1 for row in rows)
    with Image.open(output / "attention_maps.png") as picture:
        assert picture.width > 300

    # What was written is the model of the table's second line.
    model = keras.saving.load_model(output / "model.keras")
    dataset = load_image_dataset("digits", image_size=32)
    batches = dataset.batches("test", 359, value_range=images.VALUE_RANGE)
    _, accuracy = model.evaluate(batches, verbose=0)
    assert accuracy == pytest.approx(learned["test_accuracy"], abs=1e-6)
    x, _ = next(iter(batches))
    restored = tf.saved_model.load(str(output / "saved_model"))
    raw = np.stack([image.numpy() for image, _ in dataset.splits["test"]])
    probabilities = restored.serve(raw)["probabilities"].numpy()
    expected = keras.ops.softmax(model.predict(x, verbose=0))
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5, atol=1e-6)
    names = (output / "saved_model/assets/class_names.txt").read_text().split()
    assert names == list("0123456789")

    # Started again, a finished run is read, not repeated.
    again = images.main([*SMALL, "--output", str(output)])
    assert again["models"] == metrics["models"]
    assert "Epoch" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"other settings: pass --overwrite"):
        images.main([*SMALL, "--output", str(output), "--seed", "1"])


def test_image_classifier_names_bad_input(images, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"error: Argument `name` must be 'digits'"):
        images.main(["--dataset", "digts", "--output", str(tmp_path / "a")])
    with pytest.raises(SystemExit, match=r"error: .*patch"):
        images.main(["--patch-size", "5", "--output", str(tmp_path / "b")])
    (tmp_path / "file").write_text("")

    # The output folder is tried before the data are read.
    def fail(*args, **kwargs):
        raise AssertionError("the data were read first")

    monkeypatch.setattr(images, "load_image_dataset", fail)
    with pytest.raises(
        SystemExit, match=r"error: the output folder .*run cannot be written: .*file"
    ):
        images.main(["--output", str(tmp_path / "file" / "run")])


def test_image_classifier_defaults(images):
    assert images.parse_arguments([]).output == "runs/digits"
    fashion = images.parse_arguments(["--dataset", "fashion_mnist"])
    assert (fashion.image_size, fashion.patch_size) == (28, 4)
    other = images.parse_arguments(["--dataset", "tfds:cifar10", "--epochs", "7"])
    assert other.output == "runs/tfds_cifar10"
    assert other.epochs == 7
    assert images.parse_arguments(["--dataset", "a/photos/"]).output == "runs/photos"


@pytest.mark.slow
def test_image_classifier_goes_on_after_it_was_killed(tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, str(IMAGE_SCRIPT), *SMALL, "--output", str(output)]
    command[command.index("--epochs") + 1] = "30"
    log = output / "vit" / "log.csv"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not log.is_file() or len(log.read_text().splitlines()) < 4:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(log.read_text().splitlines()) - 1
    assert done < 30
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    first = finished.stdout.split("Epoch ")[1]
    # It loses the epoch that it was in, and at most the one that was being saved.
    assert int(first.split("/")[0]) in (done, done + 1)
    epochs = [int(r["epoch"]) for r in read_history(output) if r["model"] == "vit"]
    assert epochs == list(range(30))
    assert not (output / "vit" / "backup").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_eight_tokens_read_digits(images, seed, tmp_path):
    arguments = images.parse_arguments(["--seed", str(seed)])
    assert arguments.num_tokens == 8
    dataset = images.load_image_dataset("digits", arguments.image_size, seed=seed)
    model = images.build("token_learner_vit", dataset, arguments)
    result = images.train_and_measure(
        "token_learner_vit", model, dataset, arguments, tmp_path / "run"
    )
    assert result["test_accuracy"] >= 0.97
