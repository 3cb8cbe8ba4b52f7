"""Where the time goes on the CPU under XLA, with Keras's forms and with ours.

    python benchmarks/cpu_profile.py

Both forms of each work take turns, and times are medians. Then a process for each form
lists its largest costs: TensorFlow's profiler gives the time of each instruction of the
compiled program, and XLA's dump the layer that the instruction comes from.
"""

import argparse
import collections
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf
from common import median, time_in_turns, write_results
from rivals import build_model, layer_step, training
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from tokenlearner_keras.layers._forms import literal_definitions

LAYER_SHAPE, LAYER_BATCH = (24, 24, 768), 8
WORKS = ("v1", "v10", "v11", "ViT-S/16 with TokenLearner")
FORMS = {"Keras's": literal_definitions, "ours": contextlib.nullcontext}
INSTRUCTION = re.compile(
    r'^\s*(?:ROOT )?%([\w.\-]+) = .*? ([\w\-]+)\(.*?op_name="([^"]*)"', re.MULTILINE
)


def make_step(work, form):
    """Returns the step, compiled with a form."""
    with FORMS[form]():
        if work in ("v1", "v10", "v11"):
            step = layer_step(work, LAYER_SHAPE, LAYER_BATCH, backward=True)
        else:
            step = training(build_model("ours", "S/16", 8), 16)
        step()
    return step


def profile(work, form, calls=5, largest=3):
    """Returns the largest costs, as pairs of a name and milliseconds a call.

    Instructions of the same kind in the same layer of different blocks are one cost.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
        step = make_step(work, form)
        step()
        tf.profiler.experimental.start(f"{folder}/profile")
        for _ in range(calls):
            step()
        tf.profiler.experimental.stop()
        texts = Path(folder).glob("*cpu_after_optimizations.txt")
        program = max(texts, key=lambda path: path.stat().st_size).read_text()
        (trace,) = Path(folder).glob("profile/**/*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(trace.read_bytes())
    names = {
        name: readable(op, path) for name, op, path in INSTRUCTION.findall(program)
    }
    costs = collections.Counter()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                instruction = plane.event_metadata[event.metadata_id].name
                if instruction in names:
                    milliseconds = event.duration_ps / 1e9 / calls
                    costs[names[instruction]] += milliseconds
    return costs.most_common(largest)


def readable(op, path):
    """Returns a short name of an instruction: what it does and for which layer."""
    gradient = "gradient_tape/" in path
    path = re.sub(r"^.*gradient_tape/", "", path)
    path = re.sub(r"^(functional|vit_s_16)(_\d+)*/", "", path)
    path = re.sub(r"_\d+(?=/|$)", "", re.sub(r"block_\d+", "block", path))
    return f"{op} of {path}" + (" (gradient)" if gradient else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", nargs="+", default=WORKS, choices=WORKS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--profile", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.profile:
        print(json.dumps(profile(*arguments.profile)))
        return

    table = []
    for work in arguments.works:
        steps = {form: make_step(work, form) for form in FORMS}
        seconds = time_in_turns(steps, arguments.repeats)
        before = median(seconds["Keras's"])
        for form in FORMS:
            command = [sys.executable, __file__, "--profile", work, form]
            output = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            costs = json.loads(output.splitlines()[-1])
            table.append(
                {
                    "work": work,
                    "forms": form,
                    "ms": f"{1e3 * median(seconds[form]):.1f}",
                    "times as fast": f"{before / median(seconds[form]):.2f}",
                    "largest costs, ms": "; ".join(f"{n}: {t:.1f}" for n, t in costs),
                }
            )
    height, width, channels = LAYER_SHAPE
    write_results(
        "cpu_profile",
        "Largest costs on the CPU, float32, XLA",
        table,
        notes=[
            f"v1, v10, v11: the layer forward and backward, 8 tokens, {LAYER_BATCH} x "
            f"{height} x {width} x {channels}. ViT: a training step of 16 images of "
            "224 pixels, 8 tokens.",
            f"Medians of {arguments.repeats} calls in turns.",
            "Costs run side by side on the cores, so that they may add up to more than "
            "the time of the whole; equal ones of different blocks are added.",
            "A convolution returns before its work is done: its time is not in the "
            "list, but in the time of the whole.",
        ],
    )


if __name__ == "__main__":
    main()
