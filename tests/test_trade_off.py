import gzip
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import tokenlearner_keras as tlk

SCRIPT = Path(__file__).parent.parent / "examples" / "trade_off.py"
TINY = [
    *("--image-size", "16", "--patch-size", "2", "--hidden-dim", "8"),
    *("--num-layers", "4", "--num-heads", "2", "--mlp-dim", "8", "--epochs", "2"),
    *("--batch-size", "32", "--train-images", "64", "--test-images", "70"),
    *("--seeds", "1", "--no-jit-compile"),
]


@pytest.fixture(scope="module")
def example():
    specification = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(specification)
    # Where `dataclasses` looks up the module of a class.
    sys.modules[SCRIPT.stem] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Files in Fashion-MNIST's format: a bright row whose place is the class."""
    folder = tmp_path_factory.mktemp("idx")
    rng = np.random.default_rng(0)
    for part, count in (("train", 640), ("t10k", 100)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 40, (count, 28, 28))
        for image, label in zip(images, labels):
            image[4 + 2 * label : 6 + 2 * label] += 200
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + images.astype("uint8").tobytes())
        with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + labels.astype("uint8").tobytes())
    return folder


@pytest.mark.tensorflow
def test_configurations_are_those_of_the_paper(example):
    rows = example.make_configurations(8)
    layers = {name: row.num_layers for name, row in rows.items()}
    assert [layers[f"vit_{part}"] for part in ("1/4", "1/2", "3/4")] == [2, 4, 6]
    assert layers["vit"] == 8
    locations = {n: r.location for n, r in rows.items() if r.group == "location"}
    assert locations == {
        "location_0": 0,
        "location_1/4": 2,
        "location_1/2": 4,
        "location_3/4": 6,
    }
    added = [r for r in rows.values() if r.group == "added"]
    assert [(r.num_layers, r.location, r.num_tokens) for r in added] == [
        (12, 6, 8),
        (14, 7, 8),
        (14, 7, 16),
    ]
    at_half = [r for r in rows.values() if r.num_layers == 8 and r.location == 4]
    assert {r.num_tokens for r in at_half} == {4, 8, 16, 32}
    assert {r.token_learner for r in at_half} == {
        *("v1", "v10", "v11", "grid", "dense", "pooling")
    }
    assert len(rows) == 19
    # At less than the cost of the ViT, as in table 1.
    arguments = example.parse_arguments([])
    for name in ("added_1.75_8", "added_1.75_16"):
        cost, base = (
            tlk.count_flops(example.make_vit(rows[n], arguments)).total
            for n in (name, "vit")
        )
        assert 0.85 * base < cost < base
    # No two rows are the same model.
    models = {
        (r.num_layers, r.location, r.num_tokens, r.token_learner): n
        for n, r in rows.items()
    }
    assert len(models) == 19


def test_models_are_as_configured(example):
    arguments = example.parse_arguments([])
    assert (arguments.image_size // arguments.patch_size) ** 2 == 196
    assert arguments.seeds == 5
    rows = example.make_configurations(8)
    kinds = {
        "grid": tlk.layers.GridTokenizer,
        "dense": tlk.layers.DenseTokenizer,
        "pooling": tlk.layers.PoolingTokenizer,
    }
    for name in ("location_3/4", "num_tokens_4", "v10", *kinds):
        model = example.make_vit(rows[name], arguments)
        tokenizer = model.get_layer("token_learner")
        assert type(tokenizer) is kinds.get(name, tlk.layers.TokenLearner)
        assert tokenizer.output.shape == (None, 4 if name == "num_tokens_4" else 8, 64)
        # It stands before the block that is named.
        names = [layer.name for layer in model.layers]
        following = names[names.index("token_learner") + 1]
        assert following == f"block_{rows[name].location}"
    assert model.input_shape == (None, 56, 56, 1)
    v10 = example.make_vit(rows["v10"], arguments).get_layer("token_learner")
    assert v10.use_norm


def test_batches_keep_labels_and_can_be_repeated(example):
    images = np.arange(6, dtype="uint8")[:, None, None, None] * np.ones(
        (28, 28, 1), "uint8"
    )
    a = example.Batches(images, np.arange(6), 3, seed=1)
    b = example.Batches(images, np.arange(6), 3, seed=1)
    first = [a[i] for i in range(2)]
    for (x, y), (other, _) in zip(first, [b[0], b[1]]):
        np.testing.assert_array_equal(x, other)
        assert x.dtype == np.uint8
        np.testing.assert_array_equal(x[:, 14, 14, 0], y)
    assert sorted(np.concatenate([y for _, y in first])) == list(range(6))
    a.on_epoch_end()
    again = np.concatenate([a[i][1] for i in range(2)])
    assert not np.array_equal(again, np.concatenate([y for _, y in first]))


@pytest.mark.slow
@pytest.mark.backends
def test_whole_run(example, data_dir, tmp_path, capsys):
    output = tmp_path / "out"
    command = [
        *(*TINY, "--epochs", "12", "--train-images", "640", "--hidden-dim", "16"),
        *("--learning-rate", "0.01", "--configurations", "vit_1/4"),
        *("--data-dir", str(data_dir), "--output", str(output)),
    ]
    example.main(command)
    path = output / "results.json"
    results = json.loads(path.read_text())
    ((name, run),) = results["runs"].items()
    assert name == "vit_1/4/seed0"
    # It learned something: chance is 0.1.
    assert 0.3 < run["accuracy"] <= 1
    assert run["loss"] < 2
    assert run["backend"] == keras.backend.backend()
    speeds = results["speeds"]["vit_1/4"]
    assert speeds["images_per_second"] > speeds["training_images_per_second"] > 0
    assert speeds["device"] == run["device"]
    printed = capsys.readouterr().out
    assert "1 of 1: seed 0, ViT, 1 layers" in printed
    assert "| ViT, 1 layers | - |" in (output / "table.md").read_text()
    assert (output / "trade_off.png").exists() == (
        keras.backend.backend() == "tensorflow"
    )

    # A model that trained from another seed before starts as a new one does, so that
    # it does not matter where a command was stopped.
    arguments = example.parse_arguments(command)
    row = example.make_configurations(4)["vit_1/4"]
    train, test = example.load_fashion_mnist(data_dir)
    model = example.Model(row, arguments, (28, 28, 1))
    test = test[0][:70], test[1][:70]
    other = model.run((train, test), 1)
    again = model.run((train, test), 0)
    assert again["loss"] == pytest.approx(run["loss"], rel=1e-4)
    assert abs(other["loss"] - run["loss"]) > 2e-4 * run["loss"]
    assert again["parameters"] == run["parameters"]
    # The accuracy is that of Keras.
    scores = model.model.predict(test[0], verbose=0)
    expected = np.mean(scores.argmax(-1) == test[1])
    assert model.accuracy(*test) == again["accuracy"] == pytest.approx(expected)


def test_a_stopped_command_goes_on(example, data_dir, tmp_path, monkeypatch, capsys):
    done, measured = [], []

    class Model:
        """Stands for a model that trains; is stopped in the middle of some run."""

        stop_at = None

        def __init__(self, configuration, arguments, image_shape):
            assert image_shape == (28, 28, 1)
            self.name = configuration.name

        def run(self, data, seed):
            (images, labels), (test_images, _) = data
            assert (len(images), len(labels), len(test_images)) == (64, 64, 70)
            if len(done) == self.stop_at:
                raise KeyboardInterrupt
            done.append(f"{self.name}/seed{seed}")
            return {"accuracy": 0.5, "loss": 1.0, "parameters": 10}

        def speeds(self, data):
            measured.append(self.name)
            return {"images_per_second": 2.0, "training_images_per_second": 1.0}

    monkeypatch.setattr(example, "Model", Model)
    monkeypatch.setattr(example, "report", lambda *arguments: None)
    path = tmp_path / "results.json"
    command = [*TINY, "--data-dir", str(data_dir), "--output", str(tmp_path)]
    command[command.index("--seeds") + 1] = "2"
    order = [
        f"{name}/seed{s}" for s in range(2) for name in example.make_configurations(4)
    ]
    assert len(order) == 2 * 19
    Model.stop_at = 23
    with pytest.raises(KeyboardInterrupt):
        example.main(command)
    # Whole tables first; everything that was finished is there.
    assert list(json.loads(path.read_text())["runs"]) == order[:23]
    Model.stop_at = None
    example.main(command)
    assert done == order
    assert measured == list(example.make_configurations(4))
    assert "15 of 15: seed 1, PoolingTokenizer" in capsys.readouterr().out

    # Half of the results are lost.
    results = json.loads(path.read_text())
    for name in order[::2]:
        del results["runs"][name]
    results["runs"][order[1]]["accuracy"] = 0.75
    path.write_text(json.dumps(results))
    done.clear()
    example.main([*command, "--minutes", "0"])
    assert "19 runs are left for the next command" in capsys.readouterr().out
    example.main(command)
    assert done == order[::2]
    runs = json.loads(path.read_text())["runs"]
    assert set(runs) == set(order)
    assert runs[order[1]]["accuracy"] == 0.75
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json"]

    # Nothing is left to do.
    done.clear()
    example.main([*command, "--configurations", "vit", "v11"])
    assert done == []
    assert len(measured) == 19
    with pytest.raises(SystemExit, match="results of another learning_rate"):
        example.main([*command, "--learning-rate", "0.1"])


def test_work_is_shared_out(example):
    arguments = example.parse_arguments(["--workers", "4"])
    rows = example.make_configurations(8)
    workers = example.share_out(rows.values(), arguments, dict.fromkeys(rows, 5))
    assert set(workers) == set(rows)
    loads = [
        sum(example.cost(rows[name], arguments) for name in rows if workers[name] == i)
        for i in range(4)
    ]
    assert max(loads) < 1.5 * min(loads)
    # Where nothing but speeds is left, all get as many models.
    workers = example.share_out(rows.values(), arguments, {})
    counts = [list(workers.values()).count(i) for i in range(4)]
    assert sorted(counts) == [4, 5, 5, 5]
    # Tokens of all blocks: 4 blocks of 196 and 4 of 8.
    assert example.cost(rows["location_1/2"], arguments) == 4 * 196 + 4 * 8
    assert example.cost(rows["vit"], arguments) == 8 * 196


def test_a_failed_run_does_not_stop_the_others(
    example, data_dir, tmp_path, monkeypatch, capsys
):
    class Model:
        def __init__(self, configuration, arguments, image_shape):
            self.name = configuration.name

        def run(self, data, seed):
            if self.name == "vit":
                raise MemoryError("too large")
            return {"accuracy": 0.5, "loss": 1.0, "parameters": 10}

        def speeds(self, data):
            return {"images_per_second": 2.0, "training_images_per_second": 1.0}

    monkeypatch.setattr(example, "Model", Model)
    monkeypatch.setattr(example, "report", lambda *arguments: None)
    command = [*TINY, "--data-dir", str(data_dir), "--output", str(tmp_path)]
    command[command.index("--seeds") + 1] = "2"
    names = ["vit_1/4", "vit", "location_1/2"]
    with pytest.raises(SystemExit, match="These runs failed: vit/seed0"):
        example.main([*command, "--configurations", *names])
    assert "vit/seed0 failed: MemoryError: too large" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["runs"]) == {
        f"{name}/seed{seed}" for name in ("vit_1/4", "location_1/2") for seed in (0, 1)
    }
    assert set(results["speeds"]) == {"vit_1/4", "location_1/2"}


@pytest.mark.slow
def test_two_workers(data_dir, tmp_path):
    command = [
        *(sys.executable, str(SCRIPT), *TINY, "--workers", "2"),
        *("--configurations", "vit_1/4", "vit_1/2", "--epochs", "1"),
        *("--data-dir", str(data_dir), "--output", str(tmp_path)),
    ]
    subprocess.run(command, check=True, timeout=600)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["runs"]) == {"vit_1/4/seed0", "vit_1/2/seed0"}
    assert set(results["speeds"]) == {"vit_1/4", "vit_1/2"}
    # Speeds alone, of models that are compiled first.
    del results["speeds"]["vit_1/2"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    subprocess.run(command, check=True, timeout=600)
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["runs"] == results["runs"]
    assert again["speeds"]["vit_1/4"] == results["speeds"]["vit_1/4"]
    assert again["speeds"]["vit_1/2"]["images_per_second"] > 0


def fake_results(example, arguments, offsets, seeds=5):
    """Results as a run would leave them: accuracies around 0.9 plus an offset."""
    rng = np.random.default_rng(0)
    runs = {}
    for seed in range(seeds):
        for name in example.make_configurations(arguments.num_layers):
            runs[f"{name}/seed{seed}"] = {
                "accuracy": 0.9 + offsets.get(name, 0) + rng.normal(0, 1e-4),
                "loss": 0.1,
                "parameters": 1000,
                "device": "some device",
                "backend": "jax",
                "keras": "3",
            }
    return {
        "settings": {key: getattr(arguments, key) for key in example.SETTINGS},
        "runs": runs,
        "speeds": {
            name: {
                "images_per_second": 100.0 + index,
                "training_images_per_second": None,
                # Speeds of another device are not comparable.
                "device": "slow device" if name == "v10" else "some device",
            }
            for index, name in enumerate(example.make_configurations(4))
        },
        "gflops": {},
    }


@pytest.mark.tensorflow
def test_report(example, tmp_path, capsys):
    from PIL import Image

    arguments = example.parse_arguments([*TINY, "--mixed-precision"])
    offsets = {"location_1/2": -0.004, "location_3/4": 0.01, "added_1.75_8": -0.02}
    results = fake_results(example, arguments, offsets)
    (tmp_path / "results.json").write_text(json.dumps(results))
    # Settings are those of the results.
    example.main(["--report", "--output", str(tmp_path)])
    table = (tmp_path / "table.md").read_text()
    assert table.strip() in capsys.readouterr().out
    lines = table.splitlines()
    rows = {r.label: r for r in example.make_configurations(4).values()}
    cells = {}
    for line in lines[2 : 2 + len(rows)]:
        label, *values = (cell.strip() for cell in line.strip("|").split("|"))
        cells[label] = values
    assert set(cells) == set(rows)
    tokens, gflops, parameters, accuracy, seeds, speed, training = cells[
        "TokenLearner at 3/4"
    ]
    own = [
        100 * run["accuracy"]
        for name, run in results["runs"].items()
        if name.startswith("location_3/4/")
    ]
    assert accuracy == f"{np.mean(own):.2f} ± {np.std(own, ddof=1):.2f}"
    assert (tokens, parameters, seeds, speed, training) == (
        "8",
        "1,000",
        "5",
        "107",
        "-",
    )
    assert cells["TokenLearner v10 at 1/2"][-2] == "-"
    model = example.make_vit(rows["TokenLearner at 3/4"], arguments)
    assert gflops == f"{tlk.count_flops(model, convention='xla').total / 1e9:.4f}"
    assert "mixed_bfloat16" in table
    assert "64 patches" in table

    # The sentences say what was put in.
    sentences = [line for line in lines if line.startswith("That ")]
    assert len(sentences) == 3
    assert "about as accurate as the ViT" in sentences[0]
    for pattern, points, sentence in (
        (r"behind it\) held here: (\S+) points", -0.4, sentences[0]),
        (r"is more accurate held: (\S+) points", 1.0, sentences[0]),
        (r"costs more did not hold here: (\S+) points", -2.0, sentences[1]),
    ):
        assert float(re.search(pattern, sentence)[1]) == pytest.approx(points, abs=0.05)
    assert "7 layers instead of 4" in sentences[1]
    for tokenizer in ("GridTokenizer", "DenseTokenizer", "PoolingTokenizer"):
        assert f"did not hold against {tokenizer}: -0." in sentences[2]
    for name in ("trade_off.png", "locations.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 500
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_one_seed_decides_nothing(example):
    arguments = example.parse_arguments(TINY)
    results = SimpleNamespace(values=fake_results(example, arguments, {}, seeds=1))
    results.runs = results.values["runs"]
    rows, device = example.collect(example.make_configurations(4), results)
    assert device == "some device"
    assert rows["vit"]["spread"] is None
    assert example.claims(rows) == []


def test_verdicts(example):
    assert example.verdict((0.3, 0.1, 0.5)) == "held"
    assert example.verdict((0.3, -0.1, 0.7)) == "was not decided"
    assert example.verdict((-0.3, -0.5, -0.1)) == "did not hold"


def test_bad_arguments(example, data_dir, tmp_path, capsys):
    for arguments, message in (
        (["--num-layers", "6"], "--num-layers must be a multiple of 4"),
        (["--configurations", "vti"], "received vti"),
        (["--batch-size", "99", "--train-images", "64"], "--batch-size must be"),
        (["--seeds", "0"], "--seeds, --epochs and --workers must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            example.main([*arguments, "--output", str(tmp_path)])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="There are no results yet"):
        example.main(["--report", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="--train-images is 60000, but there are 640"):
        example.main(["--data-dir", str(data_dir), "--output", str(tmp_path)])
