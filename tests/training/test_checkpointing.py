import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

from tokenlearner_keras.training import NonFiniteLossError, TrainingState, train

pytestmark = pytest.mark.tensorflow
RUN = Path(__file__).parent / "checkpointing_run.py"
X = np.random.default_rng(0).standard_normal((40, 4)).astype("float32")
Y = np.random.default_rng(1).standard_normal((40, 1)).astype("float32")


def make_dataset(epoch):
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((X, Y))
    return data.shuffle(40, seed=epoch).batch(4)


def make_model(units=3, **compile_arguments):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    x = keras.layers.Dense(units, activation="tanh")(inputs)
    x = keras.layers.Dropout(0.2)(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    model.compile("adam", "mse", metrics=["mae"], **compile_arguments)
    return model


class Stop(Exception):
    pass


def stop_after(steps):
    """A callback that ends the run, as a kill would, after a number of steps."""
    seen = [0]

    def on_train_batch_end(batch, logs):
        seen[0] += 1
        if seen[0] == steps:
            raise Stop

    return keras.callbacks.LambdaCallback(on_train_batch_end=on_train_batch_end)


def run(folder, model=None, **arguments):
    model = model or make_model()
    settings = {"epochs": 2, "save_freq": 3, "verbose": 0, **arguments}
    history = train(model, make_dataset, folder=folder, **settings)
    return model, history


def interrupted(folder, steps, **arguments):
    with pytest.raises(Stop):
        run(folder, callbacks=[stop_after(steps)], **arguments)


def assert_same(one, other):
    (model, history), (other_model, other_history) = one, other
    assert history.history == other_history.history
    assert history.epoch == other_history.epoch
    for a, b in zip(model.get_weights(), other_model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_resumes_exactly_inside_an_epoch(tmp_path):
    whole = run(tmp_path / "whole")
    for steps in (2, 5, 10, 14):  # before any checkpoint, inside, between two epochs
        folder = tmp_path / str(steps)
        interrupted(folder, steps)
        resumed = run(folder)
        assert_same(whole, resumed)
    # The same command after the end changes nothing.
    assert_same(whole, run(folder))
    saved = [path.name for path in TrainingState(folder).paths()]
    assert saved == ["step-0000000020.npz", "step-0000000018.npz"]


def test_resumes_under_steps_per_execution(tmp_path):
    model = make_model(steps_per_execution=5)
    whole = run(tmp_path / "whole", model)
    model = make_model(steps_per_execution=5)
    interrupted(tmp_path / "cut", 3, model=model)
    resumed = run(tmp_path / "cut", make_model(steps_per_execution=5))
    assert_same(whole, resumed)
    with pytest.raises(ValueError, match="must divide `steps_per_epoch`"):
        run(tmp_path / "new", make_model(steps_per_execution=3))


def test_corrupted_checkpoint_falls_back(tmp_path):
    whole = run(tmp_path / "whole")
    interrupted(tmp_path / "cut", 14)
    newest, older = TrainingState(tmp_path / "cut").paths()
    flip_byte(newest)
    with pytest.warns(UserWarning, match=f"{newest.name}.*corrupted.*{older.name}"):
        resumed = run(tmp_path / "cut")
    assert_same(whole, resumed)

    # Cut short, as by a disk that lies about what it has written; and all of them.
    newest, older = TrainingState(tmp_path / "cut").paths()
    newest.write_bytes(newest.read_bytes()[:200])
    with pytest.warns(UserWarning, match="corrupted"):
        assert TrainingState(tmp_path / "cut").load()[1]["total_steps"] == 18
    older.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="corrupted"),
        pytest.raises(ValueError, match=r"No checkpoint in .* can be read"),
    ):
        run(tmp_path / "cut")


def test_full_disk(tmp_path):
    whole = run(tmp_path / "whole")
    limit = 1000
    files = sorted((tmp_path / "whole").iterdir())
    assert min(path.stat().st_size for path in files) > limit

    # The kernel refuses to write more: training goes on, what there is stays.
    folder = tmp_path / "full"
    interrupted(folder, 8)
    before = {path: path.read_bytes() for path in TrainingState(folder).paths()}
    assert len(before) == 2
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = make_model()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        with (
            pytest.warns(UserWarning, match=r"step 9 could not be written .*2 older"),
            pytest.raises(OSError, match="File too large"),
        ):
            run(folder, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    for a, b in zip(model.get_weights(), whole[0].get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {p: p.read_bytes() for p in TrainingState(folder).paths()} == before
    assert not list(folder.glob(".*.part"))
    assert_same(whole, run(folder))


def test_full_disk_makes_room_but_keeps_the_newest(tmp_path, monkeypatch):
    state = TrainingState(tmp_path, keep=3)
    arrays = [np.arange(5.0), np.array(True)]
    for step in (1, 2, 3):
        state.save(step, arrays, {})
    replace, calls = os.replace, []

    def full_once(*paths):
        calls.append(paths)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", full_once)
    state.save(4, arrays, {"note": "x"})
    assert [path.name[-5] for path in state.paths()] == ["4", "3"]
    loaded, about = state.load()
    assert about["note"] == "x"
    np.testing.assert_array_equal(loaded[0], arrays[0])


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    steps = []
    count = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: steps.append(batch)
    )
    with pytest.raises(OSError, match=r"folder of checkpoints cannot be written"):
        run(tmp_path / "file" / "folder", callbacks=[count])
    assert steps == []


@pytest.mark.parametrize("kind", ["loss", "weights"])
def test_nan_stops_at_its_step(tmp_path, kind):
    model = make_model()

    def poison(batch, logs):
        if batch == 6:
            if kind == "loss":
                logs["loss"] = float("nan")
            else:
                model.layers[1].kernel.assign(model.layers[1].kernel * np.nan)

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=poison)
    # The loss of step 7 itself; or that of step 8, the first that saw the weights.
    step = 7 if kind == "loss" else 8
    message = rf"At step {step} \(epoch 1, step {step} of 10\), the loss is NaN.*step 6"
    with pytest.raises(NonFiniteLossError, match=message):
        run(tmp_path, model, callbacks=[callback])
    good, about = TrainingState(tmp_path).load()
    assert about["total_steps"] == 6
    for variable, array in zip(model.variables, good):
        assert np.all(np.isfinite(array))
        np.testing.assert_array_equal(variable.numpy(), array)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = make_model()

    def poison(batch, logs):
        if batch == 5:  # step 6, which saves
            model.layers[1].kernel.assign(model.layers[1].kernel * np.inf)

    callback = keras.callbacks.LambdaCallback(on_train_batch_end=poison)
    with pytest.raises(NonFiniteLossError, match=r"At step 6 .*variable '.*kernel'"):
        run(tmp_path, model, callbacks=[callback])
    assert [p.name[-5] for p in TrainingState(tmp_path).paths()] == ["3"]


def test_arrays_of_all_dtypes(tmp_path):
    import ml_dtypes

    state = TrainingState(tmp_path)
    dtypes = ["float32", "float64", "int32", "uint8", "bool", ml_dtypes.bfloat16]
    arrays = [np.arange(6).reshape(2, 3).astype(dtype) for dtype in dtypes]
    arrays.append(np.array(3, ml_dtypes.bfloat16))
    state.save(1, arrays, {})
    loaded, _ = state.load()
    for array, expected in zip(loaded, arrays, strict=True):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)


def test_misuse(tmp_path):
    interrupted(tmp_path, 4)
    with pytest.raises(ValueError, match="is of another model or optimizer"):
        run(tmp_path, make_model(units=5))
    with pytest.raises(ValueError, match="`steps_per_epoch` must be that of the run"):
        run(tmp_path, steps_per_epoch=5)
    with pytest.raises(ValueError, match="must be at most the number of batches"):
        run(tmp_path, steps_per_epoch=11)
    with pytest.raises(ValueError, match="`keep` must be at least 2"):
        run(tmp_path, keep=1)
    with pytest.raises(ValueError, match="`save_freq` must be an integer of at least"):
        run(tmp_path, save_freq=0)
    with pytest.raises(ValueError, match="`make_dataset` must be a function"):
        train(make_model(), make_dataset(0), epochs=1, folder=tmp_path)
    with pytest.raises(ValueError, match="`initial_epoch` is set by `train`"):
        run(tmp_path, initial_epoch=1)
    with pytest.raises(ValueError, match="must be built and compiled"):
        run(tmp_path, keras.Sequential([keras.layers.Dense(1)]))
    with pytest.raises(ValueError, match="`steps_per_epoch` must be given"):
        train(make_model(), lambda e: make_dataset(e).repeat(), 1, tmp_path)


def start(folder, devices):
    """Starts the run whose checkpoints, log and result lie at `folder`."""
    command = [sys.executable, str(RUN), str(folder), str(devices)]
    # Of a crash outside Python, the errors then say where it was.
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    with open(f"{folder}.err", "a") as errors:
        return subprocess.Popen(command, env=environment, stderr=errors)


def result(folder, process):
    code = process.wait()
    assert code == 0, (code, Path(f"{folder}.err").read_text()[-5000:])
    return json.loads(Path(f"{folder}.json").read_text())


def progress(folder, process):
    """The number of steps a process has trained, and 1 for having imported everything."""
    path = Path(f"{folder}.log")
    lines = path.read_text().splitlines() if path.exists() else []
    return len({line for line in lines if line.startswith(f"{process.pid} ")})


def kill_and_compare(tmp_path, kills, seed, devices=1):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    uninterrupted = start(whole, devices)
    rng = random.Random(seed)
    trained = []
    for _ in range(kills):
        process = start(killed, devices)
        steps = rng.randrange(18)
        while progress(killed, process) <= steps:
            assert process.poll() is None, Path(f"{killed}.err").read_text()[-5000:]
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))  # anywhere in a step, or while it saves
        process.kill()
        assert process.wait() == -signal.SIGKILL
        trained.append(progress(killed, process) - 1)
    killed = result(killed, start(killed, devices))
    whole = result(whole, uninterrupted)
    assert len(whole["history"]["loss"]) == len(whole["epoch"]) == 6
    if devices == 1:
        assert killed == whole  # bitwise: JSON holds every digit of a float
        return trained
    for name, values in whole["history"].items():
        np.testing.assert_allclose(
            killed["history"][name], values, rtol=1e-5, err_msg=name
        )
    for one, other in zip(killed["weights"], whole["weights"], strict=True):
        np.testing.assert_allclose(
            *(np.frombuffer(bytes.fromhex(w), "float32") for w in (one, other)),
            rtol=1e-5,
            atol=1e-6,
        )
    return trained


def test_kill_minus_9(tmp_path):
    assert len(kill_and_compare(tmp_path, kills=2, seed=0)) == 2


@pytest.mark.slow
def test_20_random_kills(tmp_path):
    assert len(kill_and_compare(tmp_path, kills=20, seed=1)) == 20


@pytest.mark.slow
def test_kills_on_two_devices(tmp_path):
    assert len(kill_and_compare(tmp_path, kills=3, seed=2, devices=2)) == 3


def test_no_warnings_in_a_good_run(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*checkpoint.*")
        run(tmp_path)
