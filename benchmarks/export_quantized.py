"""Size and test accuracy of a trained model in every export format and precision.

Takes the model that `examples/train_image_classifier.py` trained on the digits:

    python examples/train_image_classifier.py --output runs/digits
    python benchmarks/export_quantized.py --model runs/digits/model.keras
"""

import argparse
import importlib.metadata
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from common import write_results

FILES = {
    "saved_model": "saved_model",
    "litert": "model.tflite",
    "onnx": "model.onnx",
    "openvino": "model.xml",
}
PRECISIONS = (None, "float16", "int8")
PACKAGES = ("ai-edge-litert", "onnxruntime", "openvino", "tf2onnx")
VALUE_RANGE = (0.0, 1.0)  # As in the example.


def load_test_images(model, seed):
    from tokenlearner_keras.data import load_image_dataset

    dataset = load_image_dataset("digits", model.input_shape[1], seed=seed)
    batches = list(dataset.batches("test", 64, value_range=VALUE_RANGE))
    return tuple(np.concatenate([np.asarray(x) for x in xs]) for xs in zip(*batches))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a .keras file")
    parser.add_argument("--seed", type=int, default=0, help="the training's")
    arguments = parser.parse_args()

    import keras

    from tokenlearner_keras.export import export_model

    model = keras.saving.load_model(arguments.model, compile=False)
    test = load_test_images(model, arguments.seed)
    rows, data = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for format, file in FILES.items():
            for precision in PRECISIONS:
                if (format, precision) == ("saved_model", "float16"):
                    continue
                report = export_model(
                    model,
                    Path(folder) / str(precision) / file,
                    quantize=precision,
                    check_data=test,
                )
                print(report, flush=True)
                data[f"{format}/{precision or 'float32'}"] = {
                    "num_bytes": report.num_bytes,
                    "accuracy": report.accuracy,
                    "max_difference": report.max_difference,
                }
                rows.append(
                    {
                        "format": format,
                        "weights": precision or "float32",
                        "size, kB": f"{report.num_bytes / 1e3:.0f}",
                        "test accuracy": f"{report.accuracy:.4f}",
                        "Keras": f"{report.reference_accuracy:.4f}",
                        "largest difference": f"{report.max_difference:.1e}",
                    }
                )
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    notes = [
        f"Model {model.name}, {model.count_params()} parameters, trained on the digits "
        f"by examples/train_image_classifier.py; {len(test[1])} test images.",
        "Largest difference: of any probability, from the float32 model in Keras.",
        versions,
    ]
    title = "Size and accuracy of exported models"
    write_results("export_quantized", title, rows, notes, data)


if __name__ == "__main__":
    main()
