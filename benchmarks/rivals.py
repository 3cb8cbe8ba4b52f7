"""Our models and layers beside k3im's and keras-hub's, on the CPU, in one run.

    pip install k3im keras-hub
    python benchmarks/rivals.py [--models] [--layers] [--sizes S/16] [--works ...]

Every row lives in a process of its own, which gives its first call and its peak
memory. The processes then take turns, and speeds are medians. Results are written after
each kind of work, beside what earlier runs on the same machine left in the table.
"""

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from common import RESULTS, machine, median, time_in_turns, write_results

import tokenlearner_keras as tlk

SIZES = {"S/16": (384, 6, 1536), "B/16": (768, 12, 3072)}
LAYER_SIZES = ((14, 14, 384), (24, 24, 768))
LAYERS = ("k3im", "v1", "v10", "v11")
MODULES = {
    "ours": "tokenlearner_keras",
    "k3im": "k3im.token_learner",
    "keras-hub": "keras_hub.models",
}


def build_model(package, size, num_tokens):
    dim, heads, mlp_dim = SIZES[size]
    module = importlib.import_module(MODULES[package])
    if package == "ours":
        return module.models.vit(size, num_tokens=num_tokens)
    if package == "k3im":
        return module.ViTokenLearner(
            224, 16, 1000, dim, 12, heads, mlp_dim, num_tokens or 8,
            use_token_learner=num_tokens is not None,
        )  # fmt: skip
    backbone = module.ViTBackbone((224, 224, 3), 16, 12, heads, dim, mlp_dim)
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


def build_layer(kind, shape, num_tokens=8):
    inputs = keras.Input(shape)
    if kind == "k3im":
        module = importlib.import_module(MODULES[kind])
        return keras.Model(inputs, module.TokenLearner(inputs, num_tokens))
    layer = getattr(tlk.layers.TokenLearner, kind)(num_tokens)
    return keras.Model(inputs, layer(inputs))


def layer_step(kind, shape, batch_size, backward):
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
                    "k3im gives every head the whole width (12 heads of 768 for B/16), "
                    "so that its attention has about `heads` times the weights of a "
                    "ViT's.",
                    "k3im's TokenLearner stands after block 7 of 12, ours before "
                    "block 7.",
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
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--works", nargs="+", default=list(WORK), choices=WORK)
    parser.add_argument("--repeats", type=int, default=5, help="of the models")
    parser.add_argument("--suffix", default="", help="of the models' results")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        run_row(*json.loads(arguments.row))
        return
    everything = not (arguments.models or arguments.layers)
    if arguments.layers or everything:
        benchmark_layers(repeats=15)
    if arguments.models or everything:
        benchmark_models(
            arguments.sizes, arguments.works, arguments.repeats, arguments.suffix
        )


if __name__ == "__main__":
    main()
