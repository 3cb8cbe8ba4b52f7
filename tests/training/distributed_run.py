"""Trains small models on 1 and on 2 or 4 virtual CPU devices; keeps what each gave.

    distributed_run.py DEVICES RESULTS.json

Run by test_distributed.py in a process of its own: the number of devices is fixed when
TensorFlow starts.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

# What is compiled here runs for a moment: no time for LLVM to make it fast.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import numpy as np


def virtual_cpus(number):
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * number,
    )
    tf.config.threading.set_inter_op_parallelism_threads(16)
    tf.config.threading.set_intra_op_parallelism_threads(2)


# One number a process: the collective operations of TensorFlow allow no other.
DEVICES = int(sys.argv[1])
STAGE = sys.argv[3] if len(sys.argv) > 3 else "steps"
virtual_cpus(DEVICES)

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402

from tokenlearner_keras.layers import TokenLearner  # noqa: E402
from tokenlearner_keras.training import distributed, get_strategy  # noqa: E402

RNG = np.random.default_rng(0)
X = RNG.standard_normal((42, 4, 4, 3)).astype("float32")
Y = RNG.integers(0, 3, 42)
WEIGHTS = RNG.random(42).astype("float32")


def batches(arrays, size):
    dataset = tf.data.Dataset.from_tensor_slices(arrays).batch(size)
    options = tf.data.Options()
    # The thread that tunes a pipeline can hold up its end for a minute.
    options.autotune.enabled = False
    return dataset.with_options(options)


def token_model(**kwargs):
    inputs = keras.Input((4, 4, 3))
    x = keras.layers.Dense(
        8, activation="relu", kernel_regularizer=keras.regularizers.L2(1e-2)
    )(inputs)
    x = TokenLearner.v11(num_tokens=2, bottleneck_dim=4)(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, keras.layers.Dense(3, dtype="float32")(x))


def stateful_model(dropout=0.0):
    inputs = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(4, 3)(inputs)
    x = keras.layers.BatchNormalization(momentum=0.5)(x)
    x = keras.layers.Dropout(dropout, seed=3)(x)
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(3)(x))


def train(devices, build, optimizer, precision="float32", jit=None, **fit):
    """Losses, metrics, predictions and weights after three epochs.

    One device trains with Keras's own `fit` without XLA, several with XLA.
    """
    keras.utils.set_random_seed(1)
    keras.config.set_dtype_policy(precision)
    if devices == 1:
        strategy = get_strategy("cpu", verbose=False)
    else:
        names = [f"CPU:{index}" for index in range(devices)]
        strategy = get_strategy("mirrored", devices=names, verbose=False)
    steps_per_execution = fit.pop("steps_per_execution", 1)
    arrays = fit.pop("arrays", (X, Y))
    callbacks = fit.pop("callbacks", [])
    with strategy.scope():
        model = build()
        plain_class = type(model)
        assert distributed(model) is model
        model.compile(
            optimizer(),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            jit_compile=devices > 1 if jit is None else jit,
            steps_per_execution=1 if devices == 1 else steps_per_execution,
        )
    steps = []
    on_batch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: steps.append(batch)
    )
    history = model.fit(
        batches(arrays, 12),
        epochs=3,
        shuffle=False,
        verbose=0,
        callbacks=[on_batch, *callbacks],
        **fit,
    )
    assert type(model) is plain_class
    keras.config.set_dtype_policy("float32")
    result = {name: values for name, values in history.history.items()}
    result["steps"] = steps
    result["weights"] = np.concatenate(
        [np.ravel(w).astype("float64") for w in model.get_weights()]
    ).tolist()
    return model, result


def predict(model):
    return model.predict(batches(X[:25], 8), verbose=0).tolist()


def everything(devices, steps_per_execution):
    """Weighted examples, an uneven last batch, regularisation, EMA, clipping."""
    model, result = train(
        devices,
        token_model,
        lambda: keras.optimizers.AdamW(
            1e-2, global_clipnorm=0.5, use_ema=True, ema_overwrite_frequency=3
        ),
        steps_per_execution=steps_per_execution,
        arrays=(X, Y, WEIGHTS),
        validation_data=batches((X[:30], Y[:30]), 12),
    )
    result["predictions"] = predict(model)
    result["evaluated"] = model.evaluate(batches((X[:25], Y[:25]), 8), verbose=0)
    return model, result


def main():
    results = {}
    start = time.time()

    def note(what):
        Path(sys.argv[2]).write_text(json.dumps(results))
        print(f"{time.time() - start:.0f} s: {what}", flush=True)

    if STAGE == "states":
        states(results, note)
        return
    _, results["everything_1"] = everything(1, 1)
    note("everything, one device")
    if DEVICES == 4:
        _, results["everything_4"] = everything(4, 1)
        Path(sys.argv[2]).write_text(json.dumps(results))
        return
    model, results["everything_2"] = everything(2, 3)

    note("before Saving gives")
    # Saving gives back the class that the model has without `distributed`.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
        results["reloaded"] = {
            "class": type(loaded).__name__,
            "same_class": type(loaded) is type(model),
            "hooks": [n for n in vars(loaded) if n in ("train_step", "_make_function")],
            "predictions": predict(loaded),
        }

    note("before accumulation")
    accumulation = dict(
        build=token_model,
        # Not Adam: it makes whole steps of the rounding where a gradient is zero, as
        # that of a key's bias is.
        optimizer=lambda: keras.optimizers.SGD(1e-1, gradient_accumulation_steps=2),
        precision="mixed_bfloat16",
        arrays=(X[:36], Y[:36]),
    )
    for devices in (1, 2):
        _, results[f"bfloat16_{devices}"] = train(devices, **accumulation)
    note("before half")
    half = dict(
        build=token_model,
        optimizer=lambda: keras.optimizers.SGD(1e-1),
        precision="mixed_float16",
        arrays=(X[:36], Y[:36]),
    )
    for devices in (1, 2):
        _, results[f"float16_{devices}"] = train(devices, **half)

    note("done")


def states(results, note):
    """Layers that keep states: moving averages and random seeds."""
    # Each device gets the same examples, so that BatchNormalization sees the same.
    order = [*range(6), *range(6), *range(6, 12), *range(6, 12)]
    for devices in (1, 2):
        _, results[f"norm_{devices}"] = train(
            devices,
            stateful_model,
            lambda: keras.optimizers.SGD(1e-2, momentum=0.9),
            arrays=(X[order], Y[order]),
        )
    note("before Different examples")
    # Different examples, and random numbers: the replicas stay the same.
    model, result = train(
        2, lambda: stateful_model(0.5), lambda: keras.optimizers.SGD(1e-2)
    )
    result["replicas_differ_by"] = max(
        float(tf.reduce_max(tf.abs(tf.cast(a - b, "float32"))))
        for a, b in (v.value.values for v in model.variables)
    )
    seeds = [v for v in model.variables if "seed" in v.path]
    result["seed_steps"] = [int(v.numpy()[-1]) for v in seeds]
    results["dropout"] = result
    note("before callbacks")
    with tempfile.TemporaryDirectory() as folder:
        for devices in (1, 2):
            results[f"callbacks_{devices}"] = with_callbacks(devices, folder)
    note("done")


def with_callbacks(devices, folder):
    """Callbacks that read and write the weights, the averages and the learning rate."""
    path = f"{folder}/{devices}.weights.h5"
    model, result = train(
        devices,
        token_model,
        lambda: keras.optimizers.SGD(1e-1, use_ema=True, ema_momentum=0.8),
        validation_data=batches((X[:24], Y[:24]), 12),
        callbacks=[
            keras.callbacks.SwapEMAWeights(),
            keras.callbacks.ModelCheckpoint(path, save_weights_only=True),
            # Never enough: the rate is halved after each epoch.
            keras.callbacks.ReduceLROnPlateau("loss", 0.5, patience=0, min_delta=9.0),
            keras.callbacks.EarlyStopping("loss", restore_best_weights=True),
        ],
    )
    other = token_model()
    other.load_weights(path)
    result["saved"] = predict(other)
    result["rate"] = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
    return result


if __name__ == "__main__":
    main()
