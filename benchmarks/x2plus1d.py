"""Times training steps of X(2+1)D with the modules of the paper's last stage.

The modules take turns in one process: in every round each of them trains a few steps on
a batch that stays on the device, and the median over the rounds is reported, with the
device's name, as clips a second.

    python benchmarks/x2plus1d.py --dtype mixed_bfloat16 --batch-size 8
    KERAS_BACKEND=jax python benchmarks/x2plus1d.py --dtype mixed_bfloat16

Full size on a CPU, one clip a step, time and peak memory of the process:

    python benchmarks/x2plus1d.py --batch-size 1 --steps 1 --rounds 1 --warmup 1 \
        --modules conv2d+token_learner
"""

import argparse
import json
import os
import platform
import resource
import statistics
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from common import training_step
from keras import ops

import tokenlearner_keras as tlk

MODULES = ("conv2d+conv1d", "conv2d+joint", "conv2d+token_learner")


def main():
    arguments = parse_arguments()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(arguments.dtype)
    shape = (arguments.frames, arguments.size, arguments.size, 3)
    rng = np.random.default_rng(0)
    clips = rng.standard_normal((arguments.batch_size, *shape), dtype="float32")
    labels = rng.integers(0, 2, (arguments.batch_size, arguments.classes))
    clips = ops.convert_to_tensor(clips.astype("float32"))
    labels = ops.convert_to_tensor(labels.astype("float32"))

    steps, results = {}, {}
    for module in arguments.modules:
        model = tlk.models.x2plus1d(
            input_shape=shape,
            num_classes=arguments.classes,
            temporal_module=module,
            attention_method=arguments.attention_method,
        )
        steps[module] = training_step(
            model,
            keras.losses.BinaryCrossentropy(from_logits=True),
            clips,
            labels,
            arguments.jit,
        )
        start = time.perf_counter()
        for _ in range(arguments.warmup):
            loss = float(steps[module]())
        results[module] = {
            "parameters": model.count_params(),
            "first_steps_s": round(time.perf_counter() - start, 2),
            "loss": loss,
        }
        print(module, results[module], flush=True)

    times = {module: [] for module in arguments.modules}
    for _ in range(arguments.rounds):
        for module, step in steps.items():
            start = time.perf_counter()
            for _ in range(arguments.steps):
                loss = step()
            float(loss)  # Waits for the device.
            times[module].append((time.perf_counter() - start) / arguments.steps)

    report = {
        "device": device_name(),
        "backend": keras.backend.backend(),
        "keras": keras.__version__,
        "input_shape": [arguments.batch_size, *shape],
        "dtype": arguments.dtype,
        "jit": arguments.jit,
        "attention_method": arguments.attention_method,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "peak_memory_mib": peak_memory_mib(),
        "modules": results,
    }
    print(f"\n{report['device']}, {report['backend']}, {arguments.dtype}")
    print(f"{'module':24}{'clips/s':>10}{'ms/step':>10}{'fastest':>10}{'slowest':>10}")
    for module, seconds in times.items():
        median = statistics.median(seconds)
        results[module].update(
            clips_per_s=arguments.batch_size / median,
            median_ms=1e3 * median,
            min_ms=1e3 * min(seconds),
            max_ms=1e3 * max(seconds),
        )
        row = [arguments.batch_size / median, 1e3 * median]
        row += [1e3 * min(seconds), 1e3 * max(seconds)]
        print(f"{module:24}" + "".join(f"{value:10.2f}" for value in row))
    print(f"peak memory {report['peak_memory_mib']:.0f} MiB")
    if arguments.output:
        path = Path(arguments.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", default=MODULES)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=157)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention-method", default="auto")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--jit", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", help="JSON file to write")
    return parser.parse_args()


def device_name():
    if keras.backend.backend() == "jax":
        import jax

        device = jax.devices()[0]
        if device.platform != "cpu":
            return device.device_kind
    else:
        import tensorflow as tf

        for gpu in tf.config.list_physical_devices("GPU"):
            return tf.config.experimental.get_device_details(gpu)["device_name"]
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPU cores"


def peak_memory_mib():
    """Peak memory of the accelerator, or of the process on a CPU."""
    if keras.backend.backend() == "jax":
        import jax

        statistics_ = jax.devices()[0].memory_stats()
        if statistics_:
            return statistics_["peak_bytes_in_use"] / 2**20
    else:
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
