"""Trains a small model with `train`: the program that test_checkpointing.py kills.

    checkpointing_run.py FOLDER [DEVICES]

It does not know whether it was killed before. It writes a line to FOLDER.log when it has
imported everything and one for each step that it trains, so that the test can see how far
it has come.
"""

import json
import os
import sys
import time
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
DEVICES = int(sys.argv[2]) if len(sys.argv) > 2 else 1


def main(folder):
    log = open(f"{folder}.log", "a", buffering=1)  # noqa: SIM115
    log.write(f"{os.getpid()} started\n")
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
    train_model(model, folder, log)


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


def train_model(model, folder, log):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((STEPS * 8, 6)).astype("float32")
    y = rng.integers(0, 3, STEPS * 8)

    def make_dataset(epoch):
        data = tf.data.Dataset.from_tensor_slices((x, y))
        return data.shuffle(len(x), seed=epoch).batch(8)

    pause = keras.callbacks.LambdaCallback(
        # Room for the kills, and a record of how far each process came.
        on_train_batch_end=lambda batch, logs: (
            time.sleep(0.002),
            log.write(f"{os.getpid()} {model.optimizer.iterations.numpy()}\n"),
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
    Path(f"{folder}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
