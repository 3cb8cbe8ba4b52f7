"""Times the ViT with and without TokenLearner on one accelerator, in one run.

    KERAS_BACKEND=jax python benchmarks/vit.py
    KERAS_BACKEND=jax python benchmarks/vit.py --parts resolution tokens clips

The models of one comparison take turns, on batches that stay on the device. Parts:

- `speedup`: training and inference of ViT-B/16 at 224 and 384, the measured speed-up
  beside that of the FLOPs.
- `resolution`: images/s of training from 128 to 512 pixels.
- `tokens`: images/s of training against the number of tokens.
- `clips`: training step of the paper's last stage against the clip length, with joint
  attention, and TokenLearner followed by standard or by vector attention.

The rows are compiled first, `--compile-jobs` at a time, and then timed one by one. What
is there is written to benchmarks/results after every row.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from common import (
    inference_step,
    median,
    repeated,
    time_in_turns,
    training_step,
    write_results,
)
from keras import ops

import tokenlearner_keras as tlk

ROW, READY = "ROW ", "READY"
CLIP_MODULES = {
    "joint attention": ("joint", None),
    "TokenLearner + MHSA": ("token_learner", "multi_head"),
    "TokenLearner + vector attention": ("token_learner", "vector"),
}


def images(batch_size, size):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch_size, size, size, 3), dtype="float32")
    y = rng.integers(0, 1000, batch_size)
    return ops.convert_to_tensor(x), ops.convert_to_tensor(y.astype("int32"))


def classification_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def vit(arguments, size, num_tokens=None, location=0.5):
    return tlk.models.vit(
        arguments.variant,
        input_shape=(size, size, 3),
        num_classes=1000,
        num_tokens=num_tokens,
        tokenizer_location=location,
    )


def timed(steps, arguments, batch_size):
    """Returns images/s by name, after the first calls, whose seconds are printed."""
    print(READY, flush=True)
    sys.stdin.readline()  # The other rows wait, or are compiled no more.
    functions = {}
    for name, step in steps.items():
        start = time.perf_counter()
        repeated(step, 1)()
        print(f"{name}: first call {time.perf_counter() - start:.1f} s", flush=True)
        functions[name] = repeated(step, arguments.steps)
    seconds = time_in_turns(functions, arguments.repeats)
    return {
        name: batch_size * arguments.steps / median(values)
        for name, values in seconds.items()
    }


def flops(build):
    """FLOPs of one image: by `count_flops`, or on JAX by XLA's cost analysis."""
    if keras.backend.backend() == "tensorflow":
        return tlk.count_flops(build()).total
    import jax

    # Models built now keep off cuDNN's attention, into which the analysis cannot look.
    enabled = keras.config.is_flash_attention_enabled()
    keras.config.disable_flash_attention()
    try:
        model = build()
    finally:
        if enabled is not False:
            keras.config.enable_flash_attention()

    def call(trainable, others, inputs):
        return model.stateless_call(trainable, others, inputs, training=False)[0]

    def shapes(variables):
        return [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in variables]

    inputs = jax.ShapeDtypeStruct((1, *model.input_shape[1:]), "float32")
    values = shapes(model.trainable_variables), shapes(model.non_trainable_variables)
    # XLA gives an analysis for CPUs alone before it has compiled.
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(call).lower(*values, inputs).cost_analysis()["flops"]


def speedup(arguments, size, work):
    x, y = images(arguments.batch_size, size)
    counts, steps = [], {}
    for name, num_tokens in (("ViT", None), ("TokenLearner ViT", 8)):

        def build(num_tokens=num_tokens):
            return vit(arguments, size, num_tokens)

        counts.append(flops(build))
        if work == "training":
            steps[name] = training_step(build(), classification_loss(), x, y)
        else:
            steps[name] = inference_step(build(), x)
    speeds = timed(steps, arguments, arguments.batch_size)
    ratio, flops_ratio = (
        speeds["TokenLearner ViT"] / speeds["ViT"],
        counts[0] / counts[1],
    )
    return {
        "size": size,
        "work": work,
        "batch": arguments.batch_size,
        **{f"{name}, images/s": f"{v:.0f}" for name, v in speeds.items()},
        "speed-up": f"{ratio:.2f}",
        "FLOPs ratio": f"{flops_ratio:.2f}",
        "share": f"{ratio / flops_ratio:.2f}",
    }


def resolution(arguments, size):
    x, y = images(arguments.batch_size, size)
    steps = {
        name: training_step(
            vit(arguments, size, num_tokens), classification_loss(), x, y
        )
        for name, num_tokens in (("ViT", None), ("TokenLearner ViT", 8))
    }
    speeds = timed(steps, arguments, arguments.batch_size)
    return {
        "size": size,
        "patch tokens": (size // 16) ** 2,
        **{f"{name}, images/s": f"{v:.0f}" for name, v in speeds.items()},
        "speed-up": f"{speeds['TokenLearner ViT'] / speeds['ViT']:.2f}",
    }


def tokens(arguments, num_tokens):
    x, y = images(arguments.batch_size, 224)
    model = vit(arguments, 224, num_tokens)
    steps = {"step": training_step(model, classification_loss(), x, y)}
    speed = timed(steps, arguments, arguments.batch_size)["step"]
    return {"num_tokens": num_tokens, "images/s": f"{speed:.0f}"}


def clips(arguments, frames):
    batch_size = max(2 * arguments.batch_size // frames, 1)
    shape = (frames, 8, 8, 432)
    rng = np.random.default_rng(0)
    x = ops.convert_to_tensor(
        rng.standard_normal((batch_size, *shape), dtype="float32")
    )
    y = ops.zeros_like(x)
    steps = {}
    for name, (module, attention) in CLIP_MODULES.items():
        model = tlk.models.space_time_module(module, shape, attention=attention)
        steps[name] = training_step(model, keras.losses.MeanSquaredError(), x, y)
    speeds = timed(steps, arguments, batch_size)
    return {
        "frames": frames,
        "clips": batch_size,
        **{f"{k}, ms": f"{1e3 * batch_size / v:.2f}" for k, v in speeds.items()},
    }


# Function of a row, arguments of the rows, name and title of the results.
PARTS = {
    "speedup": (
        speedup,
        [(224, "training"), (384, "training"), (224, "inference"), (384, "inference")],
        "vit_speedup",
        "ViT-{variant} with 8 learned tokens at location 1/2, {dtype}, XLA",
    ),
    "resolution": (
        resolution,
        [(128,), (224,), (320,), (384,), (512,)],
        "vit_resolution",
        "Training of ViT-{variant} against the resolution, {dtype}, XLA",
    ),
    "tokens": (
        tokens,
        [(4,), (8,), (16,), (32,), (64,)],
        "vit_tokens",
        "Training of ViT-{variant} at 224 against the number of tokens, {dtype}, XLA",
    ),
    "clips": (
        clips,
        [(16,), (32,), (64,), (128,)],
        "clip_length",
        "Training step of one space-time module at 8x8 positions and 432 channels "
        "against the clip length, {dtype}, XLA",
    ),
}


def prepare(part, index):
    """Starts the process of one row and returns it when its models are compiled.

    Every row has a process of its own: what one model leaves in the device's memory
    would slow down the next.
    """
    process = subprocess.Popen(
        [sys.executable, *sys.argv, "--row", part, str(index)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ},
    )
    for line in process.stdout:
        if line.strip() == READY:
            break
    return process


def finish(process):
    """Lets a prepared row run and returns it, or `None` where it failed."""
    try:
        output, _ = process.communicate("go\n")
    except BrokenPipeError:
        return None
    lines = [x for x in output.splitlines() if x.startswith(ROW)]
    return json.loads(lines[-1].removeprefix(ROW)) if lines else None


def run_parts(arguments):
    """Compiles all rows, a few at a time, then times them one after the other."""
    cases = [(part, i) for part in arguments.parts for i in range(len(PARTS[part][1]))]
    with ThreadPoolExecutor(arguments.compile_jobs) as pool:
        processes = list(pool.map(lambda case: prepare(*case), cases))
    rows = {part: [] for part in arguments.parts}
    for (part, index), process in zip(cases, processes):
        row = finish(process)
        _, parameters, name, title = PARTS[part]
        if row is None:
            print(f"{part}, row {parameters[index]}: failed", flush=True)
            continue
        rows[part].append(row)
        write_results(
            name + arguments.suffix,
            title.format(**vars(arguments)),
            rows[part],
            [f"Medians of {arguments.repeats} turns of {arguments.steps} steps."],
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--variant", default="B/16")
    parser.add_argument("--dtype", default="mixed_bfloat16")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--suffix", default="", help="of the names of the results")
    parser.add_argument(
        "--compile-jobs", type=int, default=1, help="rows compiled at the same time"
    )
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is None:
        run_parts(arguments)
        return
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(arguments.dtype)
    part, index = arguments.row
    function, cases, *_ = PARTS[part]
    print(ROW + json.dumps(function(arguments, *cases[int(index)])), flush=True)


if __name__ == "__main__":
    main()
