"""Our models and layers beside k3im's and keras-hub's, in one run.

    pip install k3im keras-hub
    python benchmarks/rivals.py [--models] [--layers] [--sizes S/16] [--works ...]
    KERAS_BACKEND=jax python benchmarks/rivals.py --gpu [--sizes S/16] [--works ...]

On the CPU, every row lives in a process of its own, which gives its first call and its
peak memory. The processes then take turns, and speeds are medians. Results are written
after each kind of work, beside what earlier runs on the same machine left in the table.

With `--gpu`, models in mixed_bfloat16 on the TensorFlow or JAX backend: a process for
each size and work, in which the four models take turns, on batches that stay on the
device. On JAX, the processes compile side by side, and are then timed one by one.
"""

import argparse
import importlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Several processes share the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import keras
import numpy as np
from common import (
    RESULTS,
    inference_step,
    machine,
    median,
    program_bytes,
    repeated,
    time_in_turns,
    training_step,
    write_results,
)
from vit import READY, ROW, classification_loss, finish, images, prepare

import tokenlearner_keras as tlk

SIZES = {"S/16": (384, 6, 1536), "B/16": (768, 12, 3072)}
LAYER_SIZES = ((14, 14, 384), (24, 24, 768))
LAYERS = ("k3im", "v1", "video", "v10", "v11")
K3IM_NOTES = (
    "k3im gives every head the whole width (12 heads of 768 for B/16), so that its "
    "attention has about `heads` times the weights of a ViT's.",
    "k3im's TokenLearner stands after block 7 of 12, ours before block 7.",
)
RIVALS = {
    "ours, plain": "keras-hub, plain",
    "ours, TokenLearner": "k3im, TokenLearner",
}
MODULES = {
    "ours": "tokenlearner_keras",
    "k3im": "k3im.token_learner",
    "keras-hub": "keras_hub.models",
}


def build_model(package, size, num_tokens, image_size=224):
    dim, heads, mlp_dim = SIZES[size]
    module = importlib.import_module(MODULES[package])
    if package == "ours":
        shape = (image_size, image_size, 3)
        return module.models.vit(size, input_shape=shape, num_tokens=num_tokens)
    if package == "k3im":
        return module.ViTokenLearner(
            image_size, 16, 1000, dim, 12, heads, mlp_dim, num_tokens or 8,
            use_token_learner=num_tokens is not None,
        )  # fmt: skip
    shape = (image_size, image_size, 3)
    backbone = module.ViTBackbone(shape, 16, 12, heads, dim, mlp_dim)
    features = keras.ops.mean(backbone.output[:, 1:], axis=1)
    return keras.Model(backbone.input, keras.layers.Dense(1000)(features))


def model_rows(size):
    return {
        f"ours, plain ViT-{size}": ("ours", size, None),
        f"keras-hub, plain ViT-{size}": ("keras-hub", size, None),
        f"ours, TokenLearner ViT-{size}": ("ours", size, 8),
        f"k3im, TokenLearner ViT-{size}": ("k3im", size, 8),
    }


def inference(model, batch_size):
    import tensorflow as tf

    images = tf.random.normal((batch_size, *model.input_shape[1:]))
    function = tf.function(lambda x: model(x, training=False), jit_compile=True)
    return lambda: np.asarray(function(images))


def training(model, batch_size):
    model.compile(
        keras.optimizers.SGD(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    images = np.random.default_rng(0).normal(size=(batch_size, *model.input_shape[1:]))
    labels = np.zeros(batch_size, "int64")
    images = images.astype("float32")
    return lambda: model.train_on_batch(images, labels)


WORK = {
    "inference, batch 1": (inference, 1),
    "inference, batch 32": (inference, 32),
    "training, batch 16": (training, 16),
}


# What is done, the batch size, and the steps in a call that is timed.
GPU_WORK = {
    "inference, batch 1": ("inference", 1, 100),
    "inference, batch 256": ("inference", 256, 10),
    "training, batch 128": ("training", 128, 5),
}


def build_layer(kind, shape, num_tokens=8):
    inputs = keras.Input(shape)
    if kind == "k3im":
        module = importlib.import_module(MODULES[kind])
        return keras.Model(inputs, module.TokenLearner(inputs, num_tokens))
    layer = getattr(tlk.layers.TokenLearner, kind)(num_tokens)
    return keras.Model(inputs, layer(inputs))


def layer_step(kind, shape, batch_size, backward):
    import tensorflow as tf

    model = build_layer(kind, shape)
    x = tf.random.normal((batch_size, *shape))

    @tf.function(jit_compile=True)
    def forward_and_backward(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.square(model(x, training=True)))
        return tape.gradient(loss, [x, *(v.value for v in model.trainable_variables)])

    function = forward_and_backward if backward else tf.function(
        lambda x: model(x), jit_compile=True
    )  # fmt: skip
    return lambda: keras.tree.map_structure(np.asarray, function(x))


class Row:
    """A process that has called its step once and calls it again when called."""

    def __init__(self, kind, *arguments):
        command = [sys.executable, __file__, "--row", json.dumps([kind, *arguments])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.report = json.loads(self._answer("{"))

    def __call__(self):
        print("step", file=self.process.stdin, flush=True)
        self._answer("done")

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def _answer(self, start):
        for line in self.process.stdout:
            if line.startswith(start):
                return line
        raise RuntimeError(f"{self.process.args} stopped: {self.process.wait()}")


def peak_memory():
    """Returns the most memory that this process has held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_row(kind, *arguments):
    """What a process of `Row` does."""
    if kind == "model":
        importlib.import_module(MODULES[arguments[0]])
    start_memory = peak_memory()
    if kind == "model":
        package, size, num_tokens, work = arguments
        make, batch_size = WORK[work]
        step = make(build_model(package, size, num_tokens), batch_size)
    else:
        step = layer_step(*arguments)
    before = peak_memory()
    start = time.perf_counter()
    step()
    report = {
        "seconds": time.perf_counter() - start,
        "memory": peak_memory() - before,
        "memory_in_all": peak_memory() - start_memory,
    }
    print(json.dumps(report), flush=True)
    for _ in sys.stdin:
        step()
        print("done", flush=True)


def run_in_turns(specs, repeats, warmup):
    """Returns rows by name, and the seconds of their calls by name."""
    rows = {name: Row(*spec) for name, spec in specs.items()}
    seconds = time_in_turns(rows, repeats, warmup)
    for row in rows.values():
        row.close()
    return rows, seconds


def earlier_rows(name):
    """Returns the rows of an earlier run with the same machine and versions."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    results = json.loads(path.read_text())
    return results["rows"] if results["machine"] == machine() else []


def benchmark_models(sizes, works, repeats, suffix):
    name = f"rivals_models{suffix}"
    order = [(model, work) for s in SIZES for work in WORK for model in model_rows(s)]
    table = {(row["model"], row["work"]): row for row in earlier_rows(name)}
    for size in sizes:
        for work in works:
            batch_size = WORK[work][1]
            specs = {
                model: ("model", *spec, work)
                for model, spec in model_rows(size).items()
            }
            # A call takes seconds to half a minute; the first one has come before.
            rows, seconds = run_in_turns(specs, repeats, warmup=0)
            for model, row in rows.items():
                table[model, work] = {
                    "model": model,
                    "work": work,
                    "images/s": f"{batch_size / median(seconds[model]):.2f}",
                    "first call, s": f"{row.report['seconds']:.1f}",
                    "memory, MiB": f"{row.report['memory_in_all']:.0f}",
                    "of it for the call": f"{row.report['memory']:.0f}",
                    "calls": repeats,
                }
            write_results(
                name,
                "ViTs at 224, float32, XLA",
                [table[key] for key in order if key in table],
                notes=[
                    "Medians of the calls; the four models of a size take turns.",
                    "Memory: the most that the process held above what it held "
                    "before it built the model. For the call: what the first call, "
                    "which compiles, added to the built model.",
                    *K3IM_NOTES,
                ],
            )


def gpu_cases(sizes, works, batch_sizes, image_size, repeats):
    """Returns what each process of `--gpu` does: the arguments of `run_gpu_case`."""
    batch_sizes = batch_sizes or [batch_size for _, batch_size, _ in GPU_WORK.values()]
    return [
        (size, work, batch_size, image_size, repeats)
        for work, batch_size in zip(GPU_WORK, batch_sizes)
        if work in works
        for size in sizes
    ]


def compiled_memory(step):
    """Returns MiB on the device by XLA's account, or `None` where there is none."""
    return program_bytes(step.compiled) / 2**20 if hasattr(step, "compiled") else None


def run_gpu_case(size, work, batch_size, image_size, repeats):
    """What a process of `--gpu` does. Returns the rows of the four models."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_bfloat16")
    kind, _, count = GPU_WORK[work]
    x, y = images(batch_size, image_size)
    # Single images, each after the other, would time how fast Python starts programs.
    in_sequence = kind == "inference" and batch_size == 1
    if in_sequence:
        x, _ = images(count, image_size)
        x, batch_size, count = x[:, None], count, 1
    loss = classification_loss()
    models = {
        name: build_model(*spec, image_size) for name, spec in model_rows(size).items()
    }

    def compile_step(model):
        start = time.perf_counter()
        if kind == "training":
            step = training_step(model, loss, x, y)
        else:
            step = inference_step(model, x, in_sequence=in_sequence)
        return step, time.perf_counter() - start

    with ThreadPoolExecutor(len(models)) as pool:
        compiled = dict(zip(models, pool.map(compile_step, models.values())))
    print(READY, flush=True)
    sys.stdin.readline()  # The other processes wait, or are compiled no more.
    first_calls = {}
    for name, (step, compile_seconds) in compiled.items():
        start = time.perf_counter()
        repeated(step, 1)()
        first_calls[name] = compile_seconds + time.perf_counter() - start
    seconds = time_in_turns(
        {name: repeated(step, count) for name, (step, _) in compiled.items()}, repeats
    )
    speeds = {k: batch_size * count / median(v) for k, v in seconds.items()}
    rows = []
    for name, (step, _) in compiled.items():
        rival = RIVALS.get(name.split(" ViT-")[0])
        ratio = speeds[name] / speeds[f"{rival} ViT-{size}"] if rival else None
        memory = compiled_memory(step)
        rows.append(
            {
                "model": name,
                "work": f"{kind}, batch {1 if in_sequence else batch_size}",
                "images/s": f"{speeds[name]:.0f}",
                "× rival": f"{ratio:.2f}" if rival else "",
                "memory, MiB": "" if memory is None else f"{memory:.0f}",
                "first call, s": f"{first_calls[name]:.1f}",
            }
        )
    return rows


def benchmark_gpu(cases, suffix):
    device = re.search(r"[A-Z]+\d{2,}", machine()["device"])
    if suffix is None:
        suffix = f"_{device[0].lower()}" if device else "_bfloat16"
    name = f"rivals_models{suffix}"
    table = {(row["work"], row["model"]): row for row in earlier_rows(name)}

    def place(row):
        size = row["model"].split(" ViT-")[1]
        return list(SIZES).index(size), row["work"]

    with ThreadPoolExecutor(len(cases)) as pool:
        processes = list(pool.map(lambda i: prepare("gpu", i), range(len(cases))))
    for case, process in zip(cases, processes):
        rows = finish(process)
        if rows is None:
            print(f"{case}: failed", flush=True)
            continue
        table.update({(row["work"], row["model"]): row for row in rows})
        image_size, repeats = case[-2:]
        counts = "; ".join(f"{work}: {count}" for work, (*_, count) in GPU_WORK.items())
        write_results(
            name,
            f"ViTs at {image_size}, mixed_bfloat16, XLA, {keras.backend.backend()}",
            sorted(table.values(), key=place),
            notes=[
                f"Medians of {repeats} turns of several steps ({counts}). The four "
                "models of a size take turns.",
                "Inference, batch 1: one program that takes those images one after the "
                "other. Its memory and its first call are the program's.",
                "× rival: plain beside keras-hub's, TokenLearner beside k3im's.",
                "Memory: arguments, results and temporaries of the compiled step.",
                "First call: tracing, compiling and running, while the other models "
                f"were compiled on the same {len(os.sched_getaffinity(0))} cores.",
                *K3IM_NOTES,
                "k3im trains with 10 % dropout in its attention and after its patches, "
                "which its builder does not let one change; the others have none.",
                f"XLA_FLAGS: {os.environ.get('XLA_FLAGS') or 'none'}.",
            ],
        )


def benchmark_layers(repeats, batch_size=8):
    table = []
    for shape in LAYER_SIZES:
        for backward in (False, True):
            specs = {k: ("layer", k, shape, batch_size, backward) for k in LAYERS}
            rows, seconds = run_in_turns(specs, repeats, warmup=1)
            reference = median(seconds["k3im"])
            for kind, row in rows.items():
                table.append(
                    {
                        "layer": kind,
                        "input": "×".join(map(str, shape)),
                        "pass": "forward + backward" if backward else "forward",
                        "ms": f"{1e3 * median(seconds[kind]):.1f}",
                        "× k3im": f"{reference / median(seconds[kind]):.2f}",
                        "memory of a call, MiB": f"{row.report['memory']:.0f}",
                    }
                )
    write_results(
        "rivals_layers",
        f"TokenLearner layers, 8 tokens, batch {batch_size}, float32, XLA",
        table,
        notes=[
            f"Medians of {repeats} calls in turns.",
            "v10 with mean pooling computes what k3im's computes.",
        ],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--gpu", action="store_true", help="models, on a GPU")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--works", nargs="+", choices={**WORK, **GPU_WORK})
    parser.add_argument("--repeats", type=int, default=5, help="of the models")
    parser.add_argument("--suffix", help="of the models' results")
    # To try `--gpu` on a CPU.
    parser.add_argument("--batch-sizes", nargs=3, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--image-size", type=int, default=224, help=argparse.SUPPRESS)
    parser.add_argument("--row", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    works = arguments.works or list(GPU_WORK if arguments.gpu else WORK)
    if arguments.gpu:
        cases = gpu_cases(
            arguments.sizes,
            works,
            arguments.batch_sizes,
            arguments.image_size,
            arguments.repeats,
        )
        if arguments.row:
            print(ROW + json.dumps(run_gpu_case(*cases[int(arguments.row[1])])))
        else:
            benchmark_gpu(cases, arguments.suffix)
        return
    if arguments.row:
        run_row(*json.loads(arguments.row[0]))
        return
    everything = not (arguments.models or arguments.layers)
    if arguments.layers or everything:
        benchmark_layers(repeats=15)
    if arguments.models or everything:
        benchmark_models(
            arguments.sizes, works, arguments.repeats, arguments.suffix or ""
        )


if __name__ == "__main__":
    main()
