"""One device against several, both with XLA, through `model.fit`.

    python benchmarks/distributed.py vit
    python benchmarks/distributed.py video

Each model trains on one GPU with Keras's own `fit`, and on all GPUs under
`MirroredStrategy` with `tlk.training.distributed`, in turns in one process. Images are
synthetic: what is timed is the training step, not the reading of data. Before that, the
losses of the first steps are compared on the same global batch. On the JAX backend:
`distributed_jax.py`.

`--virtual-cpus 2` tries the script without a GPU. Compiling takes minutes; several such
commands, each with its own `--precisions` and `--output`, may compile side by side
and still be timed alone:

    for precision in mixed_bfloat16 float32; do
        python benchmarks/distributed.py vit --precisions $precision \
            --output distributed_vit_$precision --meet meeting 2 &
    done; wait
"""

import argparse
import contextlib
import fcntl
import gc
import os
import statistics
import time
from pathlib import Path

import numpy as np
from common import write_results

os.environ["KERAS_BACKEND"] = "tensorflow"


def build(arguments):
    import tokenlearner_keras as tlk

    if arguments.model == "vit":
        return tlk.models.vit("B/16", num_tokens=8)
    if arguments.model == "video":
        shape = (arguments.num_frames, 224, 224, 3)
        # Without dropout: its random numbers are those of a device.
        return tlk.models.x2plus1d("M", input_shape=shape, num_tokens=8, dropout=0.0)
    config = tlk.models.ViTConfig(
        patch_size=16, hidden_dim=16, num_layers=1, num_heads=1, mlp_dim=16
    )
    return tlk.models.vit(config, input_shape=(32, 32, 3), num_tokens=2, num_classes=10)


def make_model(arguments, strategy, precision):
    """The same model, from the same seed, inside the scope of `strategy`."""
    import keras

    from tokenlearner_keras.training import distributed

    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(precision)
    with strategy.scope():
        # Bytes, as a data set has them: a quarter of what is copied to the device.
        network = build(arguments)
        inputs = keras.Input(network.input_shape[1:], dtype="uint8")
        images = keras.ops.cast(inputs, keras.config.floatx()) / 127.5 - 1
        model = distributed(keras.Model(inputs, network(images)))
        model.compile(
            keras.optimizers.AdamW(1e-4, weight_decay=0.05),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=True,
            steps_per_execution=arguments.steps_per_execution,
        )
    return model


def make_batches(model, batch_size, num_batches):
    """Random inputs and labels, the batches stacked."""
    rng = np.random.default_rng(0)
    size = num_batches, batch_size
    x = rng.integers(0, 256, (*size, *model.input_shape[1:]), dtype="uint8")
    return x, rng.integers(0, model.output_shape[-1], size)


def make_dataset(batches):
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices(batches).cache().repeat()
    options = tf.data.Options()
    # The thread that tunes a pipeline can hold up its end for a minute.
    options.autotune.enabled = False
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    return dataset.with_options(options).prefetch(4)


def first_losses(arguments, strategy, precision, num_devices, duplicate):
    """The losses of the first steps, on the same global batches for each strategy."""
    import keras

    class Losses(keras.callbacks.Callback):
        """The loss of each execution: the log holds the mean since the start."""

        def on_train_begin(self, logs=None):
            self.losses, self.total, self.count = [], 0.0, 0

        def on_train_batch_end(self, batch, logs=None):
            total = float(logs["loss"]) * (batch + 1)
            steps = batch + 1 - self.count
            self.losses.append((total - self.total) / steps)
            self.total, self.count = total, batch + 1

    steps = arguments.check_steps * arguments.steps_per_execution
    model = make_model(arguments, strategy, precision)
    copies = num_devices if duplicate else 1
    batch_size = arguments.check_batch_size * arguments.num_devices
    batches = make_batches(model, batch_size, 4)
    if duplicate:
        # BatchNormalization sees the batch of its device. So that both runs see the
        # same, each device gets the whole batch.
        batches = tuple(np.concatenate([part] * copies, axis=1) for part in batches)
    callback = Losses()
    model.fit(
        make_dataset(batches),
        steps_per_epoch=steps,
        epochs=1,
        shuffle=False,
        verbose=0,
        callbacks=[callback],
    )
    return callback.losses


class Timer:
    """`model.fit` for some steps, timed after those in which it compiles and fills."""

    def __init__(self, arguments, strategy, precision, num_devices):
        self.strategy = strategy
        self.model = make_model(arguments, strategy, precision)
        self.batch_size = arguments.batch_size * num_devices
        self.dataset = make_dataset(make_batches(self.model, self.batch_size, 2))
        self.spe = arguments.steps_per_execution

    def images_per_second(self, steps, warmup):
        import keras

        rate = []
        start = [None]
        warmup_end = warmup * self.spe - 1
        last = (warmup + steps) * self.spe - 1

        class Clock(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if batch in (warmup_end, last):
                    float(logs["loss"])  # waits until the step is done
                    now = time.perf_counter()
                    if batch == last:
                        rate.append(now - start[0])
                    start[0] = now

        with self.strategy.scope():
            self.model.fit(
                self.dataset,
                steps_per_epoch=last + 1,
                epochs=1,
                shuffle=False,
                verbose=0,
                callbacks=[Clock()],
            )
        return steps * self.spe * self.batch_size / rate[0]


def find_devices(arguments):
    import tensorflow as tf

    if not arguments.virtual_cpus:
        gpus = tf.config.list_physical_devices("GPU")
        return [f"GPU:{index}" for index in range(len(gpus))]
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * arguments.virtual_cpus
    )
    return [f"CPU:{index}" for index in range(arguments.virtual_cpus)]


def make_strategies(devices):
    """By the number of devices: one of them, and all."""
    import tensorflow as tf

    return {
        1: tf.distribute.OneDeviceStrategy(devices[0]),
        len(devices): tf.distribute.MirroredStrategy(devices),
    }


def run(arguments):
    import keras
    import tensorflow as tf

    devices = find_devices(arguments)
    arguments.num_devices = len(devices)
    if len(devices) < 2:
        raise SystemExit(f"Needs two or more GPUs, or --virtual-cpus. Found: {devices}")
    strategies = make_strategies(devices)
    # Where the processes meet says nothing of what was measured.
    recorded = {k: v for k, v in vars(arguments).items() if k != "meet"}
    rows, data = [], {"arguments": recorded}
    for precision in arguments.precisions:
        log(f"{precision}: losses of the first steps")
        # So that float32 means float32 in the comparison.
        tf.config.experimental.enable_tensor_float_32_execution(False)
        layers = make_model(arguments, strategies[1], precision)._flatten_layers()
        duplicate = any(
            isinstance(layer, keras.layers.BatchNormalization) for layer in layers
        )
        losses = {
            n: first_losses(arguments, strategy, precision, n, duplicate)
            for n, strategy in strategies.items()
        }
        one, many = (np.array(losses[n]) for n in strategies)
        difference = float(np.max(np.abs(many - one) / np.abs(one)))
        log(f"{precision}: relative difference of losses {difference:.2g}")
        tf.config.experimental.enable_tensor_float_32_execution(True)

        timers = {
            n: Timer(arguments, strategy, precision, n)
            for n, strategy in strategies.items()
        }
        rates = {n: [] for n in timers}
        for n, timer in timers.items():
            start = time.perf_counter()
            timer.images_per_second(1, arguments.warmup)
            seconds = time.perf_counter() - start
            log(f"{precision}: {n} device(s), ready in {seconds:.0f} s")
        with turn(arguments, precision):
            for _ in range(arguments.repeats):
                for n, timer in timers.items():
                    rates[n].append(timer.images_per_second(arguments.steps, 1))
                    log(f"{precision}: {n} device(s), {rates[n][-1]:.1f} examples/s")
        medians = {n: statistics.median(values) for n, values in rates.items()}
        for n in strategies:
            rows.append(
                {
                    "precision": precision,
                    "devices": n,
                    "batch": arguments.batch_size * n,
                    "examples/s": f"{medians[n]:.1f}",
                    "fastest, slowest": f"{max(rates[n]):.1f}, {min(rates[n]):.1f}",
                    "times one device": f"{medians[n] / medians[1]:.3f}",
                    "loss difference": "" if n == 1 else f"{difference:.1e}",
                }
            )
        data[precision] = {
            "examples_per_second": rates,
            "losses": losses,
            "each_device_has_the_whole_batch_in_the_loss_check": duplicate,
        }
        del timers
        gc.collect()
        # After each precision: a run that is cut off leaves what it has.
        write_results(
            arguments.output or f"distributed_{arguments.model}",
            f"Training on one and on {len(devices)} devices: {arguments.model}, "
            "tensorflow",
            rows,
            notes=(
                "`model.fit` with XLA, AdamW, "
                f"`steps_per_execution={arguments.steps_per_execution}`, synthetic "
                f"examples; medians of {arguments.repeats} turns.",
                "loss difference: the largest relative difference to one device over "
                f"the first {arguments.check_steps * arguments.steps_per_execution} "
                "steps on the same global batches (TF32 off).",
            ),
            data=data,
        )


@contextlib.contextmanager
def turn(arguments, precision):
    """Waits until the other processes have compiled, and until none is timed."""
    if not arguments.meet:
        yield
        return
    folder, count = Path(arguments.meet[0]), int(arguments.meet[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{arguments.model}_{precision}").touch()
    deadline = time.monotonic() + arguments.patience
    # One that failed must not hold up the others for ever.
    while len(list(folder.glob("*_*"))) < count and time.monotonic() < deadline:
        time.sleep(0.5)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def log(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def parse(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("vit", "video", "toy"))
    parser.add_argument("--batch-size", type=int, help="of one device")
    parser.add_argument("--check-batch-size", type=int, default=8)
    parser.add_argument("--check-steps", type=int, default=4, help="executions")
    parser.add_argument("--num-frames", type=int, default=64)
    parser.add_argument(
        "--precisions", nargs="+", default=["mixed_bfloat16", "float32"]
    )
    parser.add_argument("--steps-per-execution", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="timed executions a turn")
    parser.add_argument("--warmup", type=int, default=2, help="executions")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--virtual-cpus", type=int, default=0)
    parser.add_argument("--output", help="name of the result files")
    parser.add_argument(
        "--meet",
        nargs=2,
        metavar=("FOLDER", "NUMBER"),
        help="be timed only when so many processes with this folder have compiled",
    )
    parser.add_argument(
        "--patience", type=float, default=300, help="seconds to wait for the others"
    )
    arguments = parser.parse_args(args)
    if arguments.batch_size is None:
        arguments.batch_size = {"vit": 256, "video": 4, "toy": 8}[arguments.model]
    return arguments


if __name__ == "__main__":
    run(parse())
