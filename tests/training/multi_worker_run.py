"""One worker: trains a small model under `MultiWorkerMirroredStrategy`, or without.

    multi_worker_run.py FOLDER OUTPUT PAUSE

With TF_CONFIG it is one of several workers, else the whole program alone. Run by
test_multi_worker.py. PAUSE: seconds to wait after each step.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
# What is compiled here runs for a moment: no time for LLVM to make it fast.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

from tokenlearner_keras.training import (
    distribute_dataset,
    distributed,
    get_strategy,
    make_pipeline,
    train,
)

# Before anything else: the workers can only be connected to a fresh runtime.
strategy = get_strategy("auto")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402


def main(folder, output, pause):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((48, 6)).astype("float32")
    y = rng.integers(0, 3, 48)
    with strategy.scope():
        inputs = keras.Input((6,))
        hidden = keras.layers.Dense(8, activation="tanh")(inputs)
        model = distributed(keras.Model(inputs, keras.layers.Dense(3)(hidden)))
        model.compile(
            keras.optimizers.AdamW(1e-2),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=True,
            steps_per_execution=2,
        )

    def make_dataset(epoch):
        examples = tf.data.Dataset.from_tensor_slices((x, y))
        return make_pipeline(
            examples, 12, shuffle=48, seed=1, epoch=epoch, strategy=strategy
        )

    def wait(batch, logs):
        print(f"step {batch}", flush=True)
        time.sleep(pause)

    history = train(
        model,
        make_dataset,
        epochs=3,
        folder=folder,
        save_freq=2,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=wait)],
        verbose=0,
    )
    examples = tf.data.Dataset.from_tensor_slices((x, y))
    # 48 is no multiple of 14: the last step has 6 examples. In 30 and 15 it has none
    # for one of two workers.
    evaluated = []
    for size, batch_size in ((48, 14), (31, 10)):
        pipeline = make_pipeline(
            examples.take(size), batch_size, drop_remainder=False, strategy=strategy
        )
        evaluated += model.evaluate(distribute_dataset(pipeline, strategy), verbose=0)
    refused = ""
    try:
        model.evaluate(pipeline, verbose=0)
    except ValueError as error:
        refused = str(error)
    result = {
        "history": history.history,
        "evaluated": evaluated,
        "refused": refused,
        "weights": np.concatenate([w.ravel() for w in model.get_weights()]).tolist(),
        "replicas": strategy.num_replicas_in_sync,
    }
    Path(output).write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
