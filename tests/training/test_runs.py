import json

import keras
import numpy as np
import pytest
import yaml

from tokenlearner_keras.cli import main
from tokenlearner_keras.training.commands import parse_train
from tokenlearner_keras.training.runs import RUNS, RunConfig

pytestmark = pytest.mark.tensorflow


def test_recipes_options_and_config(tmp_path):
    config = parse_train(["charades", "--strategy", "tpu", "--num_steps=10"])
    assert config.model == "x2plus1d"
    assert config.strategy == "tpu"
    assert config.num_steps == 10
    assert parse_train(["digits"]) == RunConfig(recipe="digits", **RUNS["digits"])

    # A saved configuration repeats the run; options still come after it.
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(vars(config)))
    assert parse_train([f"--config={path}"]) == config
    changed = parse_train([f"--config={path}", "--seed", "3"])
    assert changed == RunConfig(**{**vars(config), "seed": 3})


def test_misuse(tmp_path, capsys):
    for arguments, message in (
        (["nothing"], "unknown recipe 'nothing'; there are digits"),
        ([], "a recipe is missing"),
        (["digits", "--seeed", "1"], "seeed"),
        (["digits", "--num_steps", "many"], "num_steps"),
    ):
        with pytest.raises(SystemExit) as error:
            parse_train(arguments)
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    output = str(tmp_path / "run")
    for option, message in (
        ("--precision=float8", "Invalid value for argument `precision`"),
        ("--strategy=mirrored", "needs devices that are there"),
    ):
        assert main(["train", "digits", f"--output={output}", option]) == 2
        assert message in capsys.readouterr().err
    arguments = ["train", "charades", f"--output={output}", "--strategy=cpu"]
    assert main([*arguments, f"--data={tmp_path}"]) == 2
    assert "prepared TFDS builder" in capsys.readouterr().err


@pytest.mark.slow
def test_train_command(tmp_path, capsys):
    arguments = ["train", "digits", "--strategy=cpu", "--precision=mixed_bfloat16"]
    arguments += ["--num_steps=6", "--steps_per_epoch=3", "--save_freq=2"]
    arguments += ["--batch_size=32", "--image_size=8", "--num_tokens=2"]
    output = tmp_path / "run"
    assert main([*arguments, f"--output={output}"]) == 0
    printed = capsys.readouterr().out
    assert "precision: mixed_bfloat16" in printed
    assert "OneDeviceStrategy on CPU:0" in printed
    assert "waiting for data" in printed
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["num_steps"] == 6
    history = json.loads((output / "history.json").read_text())
    assert len(history["loss"]) == len(history["val_loss"]) == 2
    assert np.all(np.isfinite(history["loss"]))
    model = keras.saving.load_model(output / "model.keras")
    assert model.input_shape == (None, 8, 8, 1)
    assert model.layers[2].compute_dtype == "bfloat16"

    # From the saved configuration, elsewhere: the same numbers.
    again = tmp_path / "again"
    repeat = [f"--config={output / 'config.yaml'}", f"--output={again}"]
    assert main(["train", *repeat]) == 0
    repeated = json.loads((again / "history.json").read_text())
    assert repeated["loss"] == history["loss"]
    assert repeated["val_loss"] == history["val_loss"]
