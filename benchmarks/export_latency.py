"""Latency of exported models: ViT-S/16 with 8 learned tokens against the plain one.

Runtime by runtime, both models run in one process on the same threads, call by call in
turns:

    python benchmarks/export_latency.py --folder exports --threads 2

The exports are kept in the folder, so that a second run only measures. `--runtimes`
measures some of the runtimes; the table is written once the folder has figures of all.
"""

import argparse
import functools
import importlib.metadata
import json
import os
from pathlib import Path

# Each runtime gets its threads by its own option; these are the others' pools.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from common import time_in_turns, write_results

MODELS = {"plain": None, "TokenLearner": 8}
FILES = {
    "saved_model": "saved_model",
    "litert": "model.tflite",
    "onnx": "model.onnx",
    "openvino": "model.xml",
}
RUNTIMES = {
    "saved_model": "TensorFlow SavedModel",
    "litert": "LiteRT",
    "onnx": "onnxruntime",
    "openvino": "OpenVINO",
}
PACKAGES = ("ai-edge-litert", "onnxruntime", "openvino", "tf2onnx")


def build(num_tokens):
    import keras

    from tokenlearner_keras.models import vit

    keras.utils.set_random_seed(0)
    model = vit("S/16", num_tokens=num_tokens)
    # The head starts at zero, and a model without information is no fair test.
    head = model.get_layer("head")
    head.kernel.assign(0.02 * keras.random.normal(head.kernel.shape))
    return model


def export_all(folder):
    """Writes what is missing; returns size, time and error by model and format."""
    from tokenlearner_keras.export import export_model

    record = folder / "exports.json"
    reports = json.loads(record.read_text()) if record.is_file() else {}
    images = test_images(2)
    for name, num_tokens in MODELS.items():
        model = None
        for format, file in FILES.items():
            key = f"{name}/{format}"
            if key in reports:
                continue
            model = model or build(num_tokens)
            report = export_model(
                model, folder / name / file, check_data=images, overwrite=True
            )
            reports[key] = {
                "num_bytes": report.num_bytes,
                "seconds": report.seconds,
                "max_difference": report.max_difference,
            }
            record.write_text(json.dumps(reports, indent=1))
            print(key, reports[key], flush=True)
    return reports


def test_images(batch):
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (batch, 224, 224, 3)).astype("float32")


def measure(folder, format, threads, repeats):
    """Returns summaries of one runtime, by model and batch."""
    from tokenlearner_keras.export import load_exported

    models = {
        name: load_exported(folder / name / FILES[format], num_threads=threads)
        for name in MODELS
    }
    results = {}
    for batch, count in repeats.items():
        images = test_images(batch)
        functions = {
            name: functools.partial(model, images) for name, model in models.items()
        }
        seconds = time_in_turns(functions, repeats=count, warmup=1)
        for name, values in seconds.items():
            results[name, batch] = summarise(values, batch)
            print(format, name, batch, results[name, batch], flush=True)
    return results


def summarise(seconds, batch):
    return {
        "p50": float(np.percentile(seconds, 50)),
        "p95": float(np.percentile(seconds, 95)),
        # The median call, so that another program's burst does not decide.
        "throughput": batch / float(np.percentile(seconds, 50)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="keeps the exports")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20, help="at batch 1")
    parser.add_argument("--large-repeats", type=int, default=5, help="at batch 32")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=[*RUNTIMES])
    parser.add_argument("--export-only", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    # Before TensorFlow starts its threads.
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(arguments.threads)

    reports = export_all(arguments.folder)
    if arguments.export_only:
        return
    repeats = {1: arguments.repeats, 32: arguments.large_repeats}
    record = arguments.folder / "latency.json"
    results = json.loads(record.read_text()) if record.is_file() else {}
    for format in arguments.runtimes:
        measured = measure(arguments.folder, format, arguments.threads, repeats)
        for (name, batch), value in measured.items():
            results[f"{format}/{name}/{batch}"] = value
        record.write_text(json.dumps(results, indent=1))
    missing = [f for f in RUNTIMES if f"{f}/plain/1" not in results]
    if missing:
        print(f"still to measure: {missing}")
        return
    rows = []
    for format, runtime in RUNTIMES.items():
        for batch in (1, 32):
            plain, learned = (results[f"{format}/{name}/{batch}"] for name in MODELS)
            rows.append(
                {
                    "runtime": runtime,
                    "batch": batch,
                    "plain p50 / p95, ms": _milliseconds(plain),
                    "TokenLearner p50 / p95, ms": _milliseconds(learned),
                    "plain, images/s": f"{plain['throughput']:.1f}",
                    "TokenLearner, images/s": f"{learned['throughput']:.1f}",
                    "ratio": f"{learned['throughput'] / plain['throughput']:.2f}",
                }
            )
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    notes = [
        "ViT-S/16 at 224x224, 1000 classes, float32, random weights; TokenLearner: "
        "v1, 8 tokens, before block 6 of 12.",
        f"{arguments.threads} threads; both models of a runtime in one process, in "
        f"turns: {arguments.repeats} calls at batch 1, "
        f"{arguments.large_repeats} at batch 32. Images/s: the batch over the median.",
        *(
            f"{name}, {RUNTIMES[format]}: {report['num_bytes'] / 1e6:.1f} MB, exported "
            f"in {report['seconds']:.1f} s, largest difference from Keras "
            f"{report['max_difference']:.1e}."
            for (name, format), report in (
                (key.split("/"), report) for key, report in reports.items()
            )
        ),
        versions,
    ]
    data = {
        "latency": results,
        "exports": reports,
    }
    write_results("export_latency", "Latency of exported models", rows, notes, data)


def _milliseconds(result):
    return f"{1e3 * result['p50']:.0f} / {1e3 * result['p95']:.0f}"


if __name__ == "__main__":
    main()
