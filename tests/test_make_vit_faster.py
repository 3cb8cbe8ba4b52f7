import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def example():
    path = ROOT / "examples" / "make_vit_faster.py"
    spec = importlib.util.spec_from_file_location("make_vit_faster", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Files in Fashion-MNIST's format: a bright row whose place is the class."""
    folder = tmp_path_factory.mktemp("idx")
    rng = np.random.default_rng(0)
    for part, count in (("train", 320), ("t10k", 160)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 40, (count, 28, 28))
        for image, label in zip(images, labels):
            image[4 + 2 * label : 6 + 2 * label] += 200
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(bytes(16) + images.astype("uint8").tobytes())
        with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(bytes(8) + labels.astype("uint8").tobytes())
    return folder


def test_data(example, data_dir):
    (images, labels), (test_images, _) = example.load_fashion_mnist(data_dir)
    assert images.shape == (320, 28, 28, 1)
    assert test_images.shape == (160, 28, 28, 1)
    assert -1 <= images.min() < -0.9
    assert 0.5 < images.max() <= 1
    assert list(labels[:11]) == [*range(10), 0]


def test_batches_are_shifted_shuffled_and_repeatable(example):
    images = np.arange(6, dtype="float32")[:, None, None, None] * np.ones((28, 28, 1))
    a = example.Batches(images, np.arange(6), 3, seed=1)
    b = example.Batches(images, np.arange(6), 3, seed=1)
    assert len(a) == 2
    first = [a[0], a[1]]
    for (x, y), (other, _) in zip(first, [b[0], b[1]]):
        np.testing.assert_array_equal(x, other)
        assert x.shape == (3, 28, 28, 1)
        # The label goes with its image, also when that is shifted.
        np.testing.assert_array_equal(x[:, 14, 14, 0], y)
    assert sorted(np.concatenate([y for _, y in first])) == list(range(6))
    a.on_epoch_end()
    again = np.concatenate([a[i][1] for i in range(2)])
    assert not np.array_equal(again, np.concatenate([y for _, y in first]))


@pytest.mark.slow
def test_whole_run_and_going_on(example, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        example,
        "QUICK",
        {
            **example.QUICK,
            "hidden_dim": 16,
            "num_layers": 2,
            "mlp_dim": 32,
            "train_images": 320,
            "test_images": 160,
            "teacher_epochs": 2,
            "batch_size": 32,
        },
    )
    command = ["--quick", "--data-dir", str(data_dir), "--output", str(tmp_path / "a")]
    example.main(command)
    folder = tmp_path / "a_quick"
    results = json.loads((folder / "results.json").read_text())
    stages = results["stages"]
    for name in ("teacher", "random/0", "regions/0", "regions/1", "scratch/2"):
        assert 0 <= stages[f"seed0/{name}"]["result"] <= 1
    assert set(results["summary"]) == {
        *("teacher/2", "random/0", "random/1", "regions/0", "regions/1", "scratch/2")
    }
    assert results["flops"]["token_learner"] < results["flops"]["teacher"]
    assert "| ViT (teacher) | 2 | 100 % |" in (folder / "table.md").read_text()
    assert (folder / "accuracy.png").stat().st_size > 1000

    # A stage that is missing is run again, the others are not.
    capsys.readouterr()
    kept = stages["seed0/teacher"]
    del results["stages"]["seed0/images_per_second"]
    (folder / "results.json").write_text(json.dumps(results))
    example.main(command)
    again = json.loads((folder / "results.json").read_text())["stages"]
    assert again["seed0/teacher"] == kept
    assert "seed0/images_per_second" in again
    assert "Epoch" not in capsys.readouterr().out

    with pytest.raises(SystemExit, match="results of another learning_rate"):
        example.main([*command, "--learning-rate", "0.1"])


def test_stages_wait_for_what_they_need(example, monkeypatch, tmp_path):
    settings = {**example.QUICK, "recovery_epochs": (1, 2)}
    needs = example.Stages.names(settings)
    assert set(needs) == {
        *("teacher", "scratch/5", "random/0", "regions/0", "regions/1", "regions/2"),
        *("random/2", "few_shot/teacher", "few_shot/token_learner"),
    }
    done = []

    def run_stage(seed, stage, *_):
        done.append(f"seed{seed}/{stage}")
        if done[-1] == "seed1/teacher":
            raise MemoryError("too large")
        return {"result": 0.5, "seconds": 1, "backend": "jax", "device": "a device"}

    monkeypatch.setattr(example, "run_stage", run_stage)
    arguments = example.parse_arguments(["--seeds", "0", "1"])
    header = {"settings": settings, "token_learner": "v11", "learning_rate": 1e-3}
    results = example.Results(tmp_path / "results.json", header)
    failed = example.run_missing(arguments, settings, results, tmp_path)
    assert failed == ["seed1/teacher"]
    # Everything of seed 0 but the speeds, and what needs no teacher of seed 1.
    assert set(results.values["stages"]) == {
        *(f"seed0/{name}" for name in needs),
        "seed1/scratch/5",
    }
    for name, needed in needs.items():
        for other in needed:
            assert done.index(f"seed0/{other}") < done.index(f"seed0/{name}")


def test_sentence_on_the_target(example):
    def cell(share, gap):
        return {"share_of_teacher_steps": share, "difference_to_teacher": gap}

    summary = {
        "teacher/25": cell(1.0, 0.0),
        "regions/0": cell(0.0, -0.6),
        "regions/2": cell(0.08, -0.004),
        "regions/5": cell(0.2, -0.001),
        "random/5": cell(0.2, -0.0071),
        "random/10": cell(0.4, 0.0),
    }
    _, text = example.sentences(summary)
    assert "start as regions, yes, after 2 epochs, 8 % of the steps (-0.40" in text
    assert "random start, no, not after 5 epochs, 20 % of the steps (-0.71" in text
    assert example.sentences({"teacher/25": cell(1.0, 0.0)}) == []
