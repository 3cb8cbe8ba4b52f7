"""Trains a small model with `train`, in children that the parent kills with signal 9.

Run by test_checkpointing.py in a process of its own. TensorFlow is imported once; the
children are forks made before it starts, so that each begins within a moment.

    checkpointing_run.py FOLDER KILLS SEED [DEVICES]
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"

import keras
import numpy as np
import tensorflow as tf

from tokenlearner_keras.training import distributed, get_strategy, train

EPOCHS = 6
STEPS = 40
DEVICES = int(sys.argv[4]) if len(sys.argv) > 4 else 1


def run(folder, output):
    """The whole program of a user: it does not know whether it was killed before."""
    if DEVICES == 1:
        strategy = get_strategy("cpu", verbose=False)
    else:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * DEVICES
        )
        tf.config.threading.set_inter_op_parallelism_threads(16)
        names = [f"CPU:{index}" for index in range(DEVICES)]
        strategy = get_strategy("mirrored", devices=names, verbose=False)
    with strategy.scope():
        model = make_model()
    train_model(model, folder, output)


def make_model():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(16, activation="tanh")(inputs)
    hidden = keras.layers.BatchNormalization()(hidden)
    hidden = keras.layers.Dropout(0.3)(hidden)
    model = distributed(keras.Model(inputs, keras.layers.Dense(3)(hidden)))
    model.compile(
        keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(1e-2, EPOCHS * STEPS), use_ema=True
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile="auto" if DEVICES == 1 else True,
    )
    return model


def train_model(model, folder, output):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((STEPS * 8, 6)).astype("float32")
    y = rng.integers(0, 3, STEPS * 8)

    def make_dataset(epoch):
        data = tf.data.Dataset.from_tensor_slices((x, y))
        return data.shuffle(len(x), seed=epoch).batch(8)

    log = open(f"{folder}.log", "a")  # noqa: SIM115
    pause = keras.callbacks.LambdaCallback(
        # Room for the kills, and a record of how far each child came.
        on_train_batch_end=lambda batch, logs: (
            time.sleep(0.002),
            log.write(f"{os.getpid()} {model.optimizer.iterations.numpy()}\n"),
            log.flush(),
        )
    )
    history = train(
        model,
        make_dataset,
        epochs=EPOCHS,
        folder=folder,
        save_freq=7,
        callbacks=[pause],
        validation_data=(x[:64], y[:64]),
        verbose=0,
    )
    result = {
        "history": history.history,
        "epoch": history.epoch,
        "weights": [w.tobytes().hex() for w in model.get_weights()],
    }
    Path(output).write_text(json.dumps(result))


def fork(folder, output):
    child = os.fork()
    if child == 0:
        try:
            run(folder, output)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def progress(folder, child):
    """The number of steps that a child has trained, without those it resumed."""
    path = Path(f"{folder}.log")
    lines = path.read_text().splitlines() if path.exists() else []
    return len({line for line in lines if line.startswith(f"{child} ")})


def main(folder, kills, seed):
    folder = Path(folder)
    os.waitpid(fork(folder / "whole", folder / "whole.json"), 0)
    rng = random.Random(seed)
    killed = []
    output = folder / "killed.json"
    while len(killed) < kills:
        child = fork(folder / "killed", output)
        steps = rng.randrange(18)
        while progress(folder / "killed", child) < steps:
            if os.waitpid(child, os.WNOHANG)[0]:
                raise RuntimeError(f"A run ended before its kill: {killed}")
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))  # anywhere in a step, or while it saves
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed.append(progress(folder / "killed", child))
    status = os.waitpid(fork(folder / "killed", output), 0)[1]
    print(json.dumps({"killed": killed, "status": status}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
