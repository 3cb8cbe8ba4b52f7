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

Each part is written to benchmarks/results as soon as it is done.
"""

import argparse
import gc
import os
import time

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

PARTS = ("speedup", "resolution", "tokens", "clips")
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


def free():
    gc.collect()
    keras.backend.clear_session()


def flops(model):
    """FLOPs of one image: by `count_flops`, or on JAX by XLA's cost analysis."""
    if keras.backend.backend() == "tensorflow":
        return tlk.count_flops(model).total
    import jax

    def call(trainable, others, inputs):
        return model.stateless_call(trainable, others, inputs, training=False)[0]

    def shapes(variables):
        return [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in variables]

    inputs = jax.ShapeDtypeStruct((1, *model.input_shape[1:]), "float32")
    values = shapes(model.trainable_variables), shapes(model.non_trainable_variables)
    # XLA gives an analysis for CPUs alone before it has compiled.
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.jit(call).lower(*values, inputs).cost_analysis()["flops"]


def speedup(arguments):
    rows = []
    for size, batch_size in ((224, arguments.batch_size), (384, arguments.batch_size)):
        x, y = images(batch_size, size)
        counts = [flops(vit(arguments, size, n)) for n in (None, 8)]
        for what in ("training", "inference"):
            steps = {}
            for name, num_tokens in (("ViT", None), ("TokenLearner ViT", 8)):
                model = vit(arguments, size, num_tokens)
                if what == "training":
                    steps[name] = training_step(model, classification_loss(), x, y)
                else:
                    steps[name] = inference_step(model, x)
            speeds = timed(steps, arguments, batch_size)
            ratio = speeds["TokenLearner ViT"] / speeds["ViT"]
            row = {
                "size": size,
                "work": what,
                "batch": batch_size,
                **{f"{name}, images/s": f"{v:.0f}" for name, v in speeds.items()},
                "speed-up": f"{ratio:.2f}",
                "FLOPs ratio": f"{counts[0] / counts[1]:.2f}",
                "share": f"{ratio * counts[1] / counts[0]:.2f}",
            }
            rows.append(row)
            print(row, flush=True)
            del steps, model
            free()
    write_results(
        f"vit_speedup{arguments.suffix}",
        f"ViT-{arguments.variant} with 8 learned tokens at location 1/2, "
        f"{arguments.dtype}, XLA",
        rows,
        [f"Medians of {arguments.repeats} turns of {arguments.steps} steps."],
    )


def resolution(arguments):
    rows = []
    for size in (128, 224, 320, 384, 512):
        batch_size = max(arguments.batch_size // 2, 1)
        x, y = images(batch_size, size)
        steps = {
            name: training_step(
                vit(arguments, size, num_tokens), classification_loss(), x, y
            )
            for name, num_tokens in (("ViT", None), ("TokenLearner ViT", 8))
        }
        speeds = timed(steps, arguments, batch_size)
        rows.append(
            {
                "size": size,
                "patch tokens": (size // 16) ** 2,
                **{f"{name}, images/s": f"{v:.0f}" for name, v in speeds.items()},
                "speed-up": f"{speeds['TokenLearner ViT'] / speeds['ViT']:.2f}",
            }
        )
        print(rows[-1], flush=True)
        del steps
        free()
    write_results(
        f"vit_resolution{arguments.suffix}",
        f"Training of ViT-{arguments.variant} against the resolution, "
        f"{arguments.dtype}, XLA",
        rows,
    )


def tokens(arguments):
    x, y = images(arguments.batch_size, 224)
    rows = []
    for num_tokens in (4, 8, 16, 32, 64):
        model = vit(arguments, 224, num_tokens)
        steps = {"step": training_step(model, classification_loss(), x, y)}
        speed = timed(steps, arguments, arguments.batch_size)["step"]
        rows.append({"num_tokens": num_tokens, "images/s": f"{speed:.0f}"})
        print(rows[-1], flush=True)
        del steps, model
        free()
    write_results(
        f"vit_tokens{arguments.suffix}",
        f"Training of ViT-{arguments.variant} at 224 against the number of tokens, "
        f"{arguments.dtype}, XLA",
        rows,
    )


def clips(arguments):
    rng = np.random.default_rng(0)
    rows = []
    for frames in (16, 32, 64, 128):
        batch_size = max(arguments.batch_size // frames, 1)
        shape = (frames, 8, 8, 432)
        x = ops.convert_to_tensor(
            rng.standard_normal((batch_size, *shape), dtype="float32")
        )
        y = ops.zeros_like(x)
        steps = {}
        for name, (module, attention) in CLIP_MODULES.items():
            model = tlk.models.space_time_module(module, shape, attention=attention)
            steps[name] = training_step(model, keras.losses.MeanSquaredError(), x, y)
        speeds = timed(steps, arguments, batch_size)
        rows.append(
            {
                "frames": frames,
                "clips": batch_size,
                **{
                    f"{k}, ms": f"{1e3 * batch_size / v:.2f}" for k, v in speeds.items()
                },
            }
        )
        print(rows[-1], flush=True)
        del steps, model
        free()
    write_results(
        f"clip_length{arguments.suffix}",
        "Training step of one space-time module at 8x8 positions and 432 channels "
        f"against the clip length, {arguments.dtype}, XLA",
        rows,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--variant", default="B/16")
    parser.add_argument("--dtype", default="mixed_bfloat16")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--suffix", default="", help="of the names of the results")
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(arguments.dtype)
    for part in arguments.parts:
        {
            "speedup": speedup,
            "resolution": resolution,
            "tokens": tokens,
            "clips": clips,
        }[part](arguments)


if __name__ == "__main__":
    main()
