"""Our models and layers beside k3im's and keras-hub's, on the CPU, in one run.

    pip install k3im keras-hub
    python benchmarks/rivals.py [--models] [--layers] [--quick]

Speeds are medians of calls in turns. Memory and the first call are measured in a fresh
process for each row.
"""

import argparse
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
from common import median, time_in_turns, write_results

import tokenlearner_keras as tlk

SIZES = {"S/16": (384, 6, 1536), "B/16": (768, 12, 3072)}
LAYER_SIZES = ((14, 14, 384), (24, 24, 768))
LAYERS = ("k3im", "v1", "v10", "v11")


def build_model(package, size, num_tokens):
    dim, heads, mlp_dim = SIZES[size]
    if package == "ours":
        return tlk.models.vit(size, num_tokens=num_tokens)
    if package == "k3im":
        from k3im.token_learner import ViTokenLearner

        return ViTokenLearner(
            224, 16, 1000, dim, 12, heads, mlp_dim, num_tokens or 8,
            use_token_learner=num_tokens is not None,
        )  # fmt: skip
    from keras_hub.models import ViTBackbone

    backbone = ViTBackbone((224, 224, 3), 16, 12, heads, dim, mlp_dim)
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
        from k3im.token_learner import TokenLearner

        return keras.Model(inputs, TokenLearner(inputs, num_tokens))
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


def in_fresh_process(kind, *arguments):
    """Returns the first call's seconds and the peak memory, in MiB, of one row."""
    command = [sys.executable, __file__, "--row", json.dumps([kind, *arguments])]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def run_row(kind, *arguments):
    if kind == "model":
        package, size, num_tokens, work = arguments
        make, batch_size = WORK[work]
        step = make(build_model(package, size, num_tokens), batch_size)
    else:
        step = layer_step(*arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    step()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"first": first, "memory": (after - before) / 1024}))


def benchmark_models(sizes, repeats):
    rows = []
    for size in sizes:
        for work, (make, batch_size) in WORK.items():
            steps = {
                name: make(build_model(*spec), batch_size)
                for name, spec in model_rows(size).items()
            }
            seconds = time_in_turns(steps, repeats)
            del steps
            keras.utils.clear_session()
            for name, spec in model_rows(size).items():
                alone = in_fresh_process("model", *spec, work)
                rows.append(
                    {
                        "model": name,
                        "work": work,
                        "images/s": f"{batch_size / median(seconds[name]):.2f}",
                        "first call, s": f"{alone['first']:.1f}",
                        "memory of two calls, MiB": f"{alone['memory']:.0f}",
                    }
                )
                print(rows[-1], flush=True)
    write_results(
        "rivals_models",
        "ViTs at 224, float32, XLA",
        rows,
        notes=[
            "k3im gives every head the whole width (12 heads of 768 for B/16), so that "
            "its attention has about `heads` times the weights of a ViT's.",
            "k3im's TokenLearner stands after block 7 of 12, ours before block 7.",
        ],
    )


def benchmark_layers(repeats, batch_size=8):
    rows = []
    for shape in LAYER_SIZES:
        for backward in (False, True):
            steps = {k: layer_step(k, shape, batch_size, backward) for k in LAYERS}
            seconds = time_in_turns(steps, repeats, warmup=2)
            reference = median(seconds["k3im"])
            for kind in LAYERS:
                alone = in_fresh_process("layer", kind, shape, batch_size, backward)
                rows.append(
                    {
                        "layer": kind,
                        "input": "×".join(map(str, shape)),
                        "pass": "forward + backward" if backward else "forward",
                        "ms": f"{1e3 * median(seconds[kind]):.1f}",
                        "× k3im": f"{reference / median(seconds[kind]):.2f}",
                        "memory of two calls, MiB": f"{alone['memory']:.0f}",
                    }
                )
                print(rows[-1], flush=True)
    write_results(
        "rivals_layers",
        f"TokenLearner layers, 8 tokens, batch {batch_size}, float32, XLA",
        rows,
        notes=["v10 with mean pooling computes what k3im's computes."],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, S/16 only")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        run_row(*json.loads(arguments.row))
        return
    everything = not (arguments.models or arguments.layers)
    if arguments.layers or everything:
        benchmark_layers(repeats=5 if arguments.quick else 15)
    if arguments.models or everything:
        sizes = ["S/16"] if arguments.quick else list(SIZES)
        benchmark_models(sizes, repeats=3 if arguments.quick else 5)


if __name__ == "__main__":
    main()
