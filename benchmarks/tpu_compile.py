"""Compiles training steps ahead of time with the real TPU compiler; no TPU is needed.

    pip install libtpu
    python benchmarks/tpu_compile.py

The model's own training step under Keras's JAX backend (forward, backward, optimizer,
metrics), data-parallel, in bfloat16, at the batch of a TPU core in the recipe. The
result is what a TPU would run: its memory must fit, and no shape may be dynamic. Writes
benchmarks/results/tpu_compile.md and .json, row by row: each may take minutes.
`--missing` compiles only what is not there yet.
"""

import argparse
import json
import os
import re
import time

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # do not ask a cloud which TPU this is
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no TPU: several may load it
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

# Name of the topology, and what one of its devices may use (GiB of HBM). A v4 chip has
# 32 GiB and is two devices here.
TOPOLOGIES = {"v4:2x2x1": 16.0, "v5e:2x2": 16.0, "v6e:2x2": 32.0}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")


def build(name):
    """A model and the examples that one device gets in a step."""
    import tokenlearner_keras as tlk

    if name == "vit":
        # The published fine-tuning: 512 images of 384 x 384, on 32 devices or more.
        shape = (384, 384, 3)
        return tlk.models.vit("B/16", input_shape=shape, num_tokens=8), 16
    if name == "vivit":
        return tlk.models.vivit("B/16", num_tokens=8, num_classes=400), 1
    if name == "x2plus1d":
        return tlk.models.x2plus1d("M"), 4  # the paper's: 4 clips a core (Charades)
    config = tlk.models.ViTConfig(
        patch_size=8, hidden_dim=128, num_layers=2, num_heads=2, mlp_dim=256
    )
    return tlk.models.vit(config, input_shape=(64, 64, 3), num_tokens=8), 8


def compile_step(name, topology_name, batch_size=None):
    """Compiles one training step; returns its figures, of one device."""
    import jax
    import keras
    import numpy as np
    from common import count_collective, program_bytes
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    keras.backend.clear_session()
    keras.config.set_dtype_policy("mixed_bfloat16")
    model, per_device = build(name)
    per_device = batch_size or per_device
    is_multi_label = name == "x2plus1d"
    loss = (
        keras.losses.BinaryCrossentropy(from_logits=True)
        if is_multi_label
        else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    optimizer = keras.optimizers.SGD(0.03, momentum=0.9, global_clipnorm=1.0)
    model.compile(optimizer, loss)
    optimizer.build(model.trainable_variables)

    topology = topologies.get_topology_desc(platform="tpu", topology_name=topology_name)
    devices = np.array(topology.devices)
    mesh = Mesh(devices.reshape(-1), ("batch",))
    whole = NamedSharding(mesh, PartitionSpec())
    shared = NamedSharding(mesh, PartitionSpec("batch"))

    def struct(shape, dtype, sharding):
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)

    state = tuple(
        [struct(v.shape, v.dtype, whole) for v in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
            model.metrics_variables,
        )
    )
    batch = per_device * devices.size
    x = struct((batch, *model.input_shape[1:]), "float32", shared)
    if is_multi_label:
        y = struct((batch, model.output_shape[-1]), "float32", shared)
    else:
        y = struct((batch,), "int32", shared)
    start = time.perf_counter()
    step = jax.jit(model.train_step, donate_argnums=0)
    compiled = step.lower(state, (x, y)).compile()
    seconds = time.perf_counter() - start

    text = compiled.as_text()
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return {
        "model": name,
        "topology": topology_name,
        "devices": int(devices.size),
        "batch_per_device": per_device,
        "gflops_per_example": cost["flops"] / per_device / 1e9,
        "memory_gib": program_bytes(compiled) / 2**30,
        "memory_limit_gib": TOPOLOGIES[topology_name],
        "collectives": {kind: count_collective(compiled, kind) for kind in COLLECTIVES},
        # A dynamic dimension is written as a bound: f32[<=8,16].
        "dynamic_shapes": len(re.findall(r"\[[^\]]*<=\d", text)),
        "seconds": seconds,
    }


def row(result):
    limit = TOPOLOGIES[result["topology"]]
    fits = result["memory_gib"] <= limit
    return {
        "model": result["model"],
        "topology": f"{result['topology']} ({result['devices']} devices)",
        "batch of a device": result["batch_per_device"],
        "GFLOPs an example": f"{result['gflops_per_example']:.1f}",
        "memory, GiB": f"{result['memory_gib']:.2f} of {limit:.0f}"
        + ("" if fits else " (!)"),
        "collectives": ", ".join(
            f"{count} {kind}" for kind, count in result["collectives"].items() if count
        ),
        "dynamic shapes": result["dynamic_shapes"],
        "compiled in": f"{result['seconds']:.0f} s",
    }


def main(arguments):
    from common import RESULTS, write_results

    wanted = [(m, t) for m in arguments.models for t in arguments.topologies]
    done = {}
    if arguments.missing:
        kept = json.loads((RESULTS / "tpu_compile.json").read_text())["data"]
        done = {(result["model"], result["topology"]): result for result in kept}
    for key in wanted:
        if key in done:
            continue
        done[key] = compile_step(*key)
        rows = [row(done[key]) for key in sorted(done)]
        print(row(done[key]), flush=True)
        write_results(
            "tpu_compile",
            "Training steps compiled for TPUs",
            rows,
            notes=(
                "Compiled ahead of time with libtpu; nothing was run on a TPU.",
                "vit: ViT-B/16 at 384 with 8 tokens; vivit: ViViT-B/16x2 with 8 "
                "tokens a frame, 32 frames; x2plus1d: X(2+1)D-M with TokenLearner, "
                "64 frames. mixed_bfloat16, SGD with momentum, data-parallel.",
                "The seconds are those of a busy machine.",
            ),
            data=list(done.values()),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit", "vivit", "x2plus1d"])
    parser.add_argument("--topologies", nargs="+", default=list(TOPOLOGIES))
    parser.add_argument(
        "--missing", action="store_true", help="keep the results that are there"
    )
    main(parser.parse_args())
