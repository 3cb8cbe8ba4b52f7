"""The commands `export`, `inspect` and `predict` of `python -m tokenlearner_keras`."""

import importlib.metadata
import json
from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
RUNTIMES = {
    "saved_model": ("tensorflow", "tensorflow-cpu"),
    "litert": ("ai-edge-litert",),
    "onnx": ("onnxruntime",),
    "openvino": ("openvino",),
}


def add_commands(subparsers) -> None:
    """Adds the three commands to the subparsers of a command line.

    Each sets `run`, a function from the parsed arguments to the exit status.

    Args:
        subparsers: What `argparse.ArgumentParser.add_subparsers` returned.
    """
    _add_export(subparsers)
    _add_inspect(subparsers)
    _add_predict(subparsers)


def _add_export(subparsers):
    parser = subparsers.add_parser(
        "export",
        help="write a .keras model as a SavedModel, or for LiteRT, ONNX or OpenVINO",
        description="Writes a .keras model in another format. The suffix of PATH names "
        "the format: .tflite, .onnx, .xml (OpenVINO) or none (a SavedModel).",
    )
    parser.add_argument("model", type=Path, help="a .keras file")
    parser.add_argument("path", type=Path, help="the file or folder to write")
    parser.add_argument("--format", choices=sorted(RUNTIMES))
    parser.add_argument(
        "--signatures",
        nargs="+",
        metavar="NAME",
        help="serve, features, attention_maps, explain, train",
    )
    parser.add_argument("--quantize", choices=["int8", "float16"])
    parser.add_argument("--batch-size", type=int, help="a fixed batch size")
    parser.add_argument(
        "--preprocessing",
        choices=["uint8", "jpeg_bytes"],
        help="what a SavedModel takes instead of ready arrays",
    )
    parser.add_argument(
        "--value-range",
        nargs=2,
        type=float,
        default=(-1.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="what pixel values 0 and 255 become, with --preprocessing",
    )
    parser.add_argument("--class-names", type=Path, help="a text file, one a line")
    parser.add_argument(
        "--output-activation",
        choices=["auto", "softmax", "sigmoid", "none"],
        default="auto",
    )
    parser.add_argument(
        "--vector-attention-method",
        choices=["interpolated", "streaming", "dense"],
        default="interpolated",
        help="what vector attention that chooses its method becomes in a file; a "
        "SavedModel goes on choosing",
    )
    parser.add_argument("--overwrite", action="store_true")
    parser.set_defaults(run=_export)


def _export(arguments):
    import keras

    from tokenlearner_keras.export import export_model, export_saved_model
    from tokenlearner_keras.export.exported_model import (
        exported_files,
        resolve_format,
    )

    if not arguments.model.is_file():
        raise ValueError(f"There is no model file at {arguments.model}")
    # Registers the layers of the package.
    import tokenlearner_keras  # noqa: F401

    model = keras.saving.load_model(arguments.model, compile=False)
    activation = arguments.output_activation
    options = {
        "output_activation": None if activation == "none" else activation,
        "overwrite": arguments.overwrite,
    }
    if arguments.signatures:
        options["signatures"] = tuple(arguments.signatures)
    format = resolve_format(arguments.path, arguments.format)
    asked = (arguments.preprocessing, arguments.class_names)
    if format == "saved_model" and arguments.quantize is None:
        if arguments.batch_size is not None:
            raise ValueError("A SavedModel has a free batch: leave out --batch-size")
        names = arguments.class_names
        export_saved_model(
            model,
            arguments.path,
            preprocessing=arguments.preprocessing,
            value_range=tuple(arguments.value_range),
            class_names=None if names is None else _read_lines(names),
            **options,
        )
        files = exported_files(arguments.path)
        size = sum(file.stat().st_size for file in files)
        print(f"{arguments.path} (saved_model)\nsize: {size / 1e6:.2f} MB")
        return 0
    if any(asked):
        raise ValueError(
            "--preprocessing and --class-names are for SavedModels without --quantize"
        )
    print(
        export_model(
            model,
            arguments.path,
            format=format,
            quantize=arguments.quantize,
            batch_size=arguments.batch_size,
            vector_attention_method=arguments.vector_attention_method,
            **options,
        )
    )
    return 0


def _add_inspect(subparsers):
    parser = subparsers.add_parser(
        "inspect",
        help="show the signatures, size and versions of an exported model",
    )
    parser.add_argument("path", type=Path, help="an exported model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_inspect)


def _inspect(arguments):
    description = describe(arguments.path)
    if arguments.json:
        print(json.dumps(description, indent=2))
        return 0
    print(f"{description['path']}: {description['format']}")
    print(f"size: {description['num_bytes'] / 1e6:.2f} MB")
    for name, version in description["versions"].items():
        print(f"{name}: {version}")
    if description["class_names"] is not None:
        print(f"class names: {len(description['class_names'])}")
    for name, signature in description["signatures"].items():
        print(f"signature {name}")
        for kind in ("inputs", "outputs"):
            for tensor, (shape, dtype) in signature[kind].items():
                print(f"  {kind[:-1]:6} {tensor}: {dtype} {_format_shape(shape)}")
    return 0


def describe(path: Path) -> dict:
    """Returns what can be read off an exported model.

    Args:
        path: A SavedModel's folder, or a `.tflite`, `.onnx` or `.xml` file.

    Returns:
        Dictionary with `path`, `format`, `num_bytes`, `versions` (what wrote it, and
        the runtime here), `class_names` (list or `None`) and `signatures`: from each
        name to `inputs` and `outputs`, from names to `(shape, dtype)`.

    Raises:
        ValueError: for a path without an exported model.
    """
    from tokenlearner_keras.export.exported_model import (
        exported_files,
        load_exported,
        resolve_format,
    )

    format = resolve_format(path, None)
    exported = load_exported(path)
    versions = _written_by(path, format)
    for package in RUNTIMES[format]:
        try:
            versions[f"runtime here, {package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    signatures = {"serving_default": exported}
    if format == "saved_model":
        signatures = {
            name: load_exported(path, signature=name)
            for name in _saved_model(path).meta_graphs[0].signature_def
            if not name.startswith("__")
        }
    return {
        "path": str(path),
        "format": format,
        "num_bytes": sum(file.stat().st_size for file in exported_files(path)),
        "versions": versions,
        "class_names": read_class_names(path),
        "signatures": {
            name: {"inputs": model.inputs, "outputs": model.outputs}
            for name, model in sorted(signatures.items())
        },
    }


def _saved_model(path):
    from tensorflow.core.protobuf import saved_model_pb2

    return saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())


def _written_by(path, format):
    if format == "saved_model":
        info = _saved_model(path).meta_graphs[0].meta_info_def
        return {"written by TensorFlow": info.tensorflow_version}
    if format == "onnx":
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        opsets = {
            entry.domain or "ai.onnx": entry.version for entry in model.opset_import
        }
        return {
            "written by": f"{model.producer_name} {model.producer_version}".strip(),
            "opset": opsets["ai.onnx"],
        }
    if format == "openvino":
        import xml.etree.ElementTree as ElementTree

        root = ElementTree.parse(path).getroot()
        version = root.find("./rt_info/Runtime_version")
        return {
            "IR version": root.get("version"),
            **({} if version is None else {"written by": version.get("value")}),
        }
    # The first offset of a flatbuffer is its root table's; four letters follow it.
    with open(path, "rb") as file:
        return {"schema": file.read(8)[4:].decode("ascii", "replace")}


def read_class_names(path: Path) -> list[str] | None:
    """Returns the class names that a SavedModel carries, or `None`."""
    file = path / "assets" / "class_names.txt"
    return _read_lines(file) if file.is_file() else None


def _read_lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def _format_shape(shape):
    if shape is None:
        return "of any shape"
    return "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")"


def _add_predict(subparsers):
    parser = subparsers.add_parser(
        "predict",
        help="run an exported model on image or video files",
        description="Runs an exported model on files and prints their top classes.",
    )
    parser.add_argument("path", type=Path, help="an exported model")
    parser.add_argument("files", type=Path, nargs="+", help="image or video files")
    parser.add_argument("--signature", help="of a SavedModel; serving_default if none")
    parser.add_argument("--top", type=int, default=5, help="classes to print")
    parser.add_argument("--class-names", type=Path, help="a text file, one a line")
    parser.add_argument(
        "--value-range",
        nargs=2,
        type=float,
        default=(-1.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="what pixel values 0 and 255 become, for a model that takes floats",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_predict)


def _predict(arguments):
    from tokenlearner_keras.export.exported_model import load_exported

    if arguments.top < 1:
        raise ValueError(f"--top must be at least 1. Received: {arguments.top}")
    exported = load_exported(arguments.path, arguments.signature)
    if "probabilities" not in exported.outputs:
        raise ValueError(
            f"The signature has no output 'probabilities' but "
            f"{sorted(exported.outputs)}: choose another with --signature"
        )
    if arguments.class_names is not None:
        names = _read_lines(arguments.class_names)
    else:
        names = read_class_names(arguments.path)
    results, failed = [], False
    for file in arguments.files:
        try:
            example = read_example(file, exported.inputs, tuple(arguments.value_range))
            (scores,) = exported.predict(example[None], 1)["probabilities"]
        except (OSError, ValueError) as error:
            failed = True
            results.append({"file": str(file), "error": str(error)})
            continue
        if names is not None and len(names) != len(scores):
            raise ValueError(
                f"There are {len(names)} class names for {len(scores)} classes"
            )
        order = np.argsort(-scores, kind="stable")[: arguments.top]
        results.append(
            {
                "file": str(file),
                "classes": [
                    {
                        "class": int(index),
                        "name": None if names is None else names[index],
                        "probability": float(scores[index]),
                    }
                    for index in order
                ],
            }
        )
    print(json.dumps(results, indent=2) if arguments.json else _table(results))
    return 1 if failed else 0


def _table(results):
    rows = [("file", "class", "probability")]
    for result in results:
        if "error" in result:
            rows.append((result["file"], f"error: {result['error']}", ""))
        for entry in result.get("classes", ()):
            name = entry["name"] or f"class {entry['class']}"
            rows.append((result["file"], name, f"{entry['probability']:.4f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in rows
    )


def read_example(file: Path, inputs: dict, value_range: tuple[float, float]):
    """Returns a file as one example of what an exported model takes.

    Args:
        file: An image file, or a video file for a model that takes clips.
        inputs: `ExportedModel.inputs`.
        value_range: What pixel values 0 and 255 become, where the model takes floats.

    Returns:
        Array without the batch axis: encoded bytes, a uint8 image or clip, or floats
        of the size that the model takes.

    Raises:
        ValueError: for a file that cannot be read, or that does not fit the model.
    """
    if not file.is_file():
        raise ValueError(f"There is no file at {file}")
    ((shape, dtype),) = inputs.values()
    if dtype == "string":
        return np.array(file.read_bytes(), dtype=object)
    if len(shape) == 5:
        pixels = _read_clip(file, shape[1])
    else:
        pixels = _read_image(file, shape[-1])
    if dtype == "uint8":
        return pixels
    size = pixels.shape[-3:-1] if None in shape[-3:-1] else shape[-3:-1]
    from tokenlearner_keras.data import preprocess_images

    return np.asarray(preprocess_images(pixels, size, value_range), dtype)


def _read_image(file, channels):
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
            pixels = np.asarray(image.convert(mode))
    except UnidentifiedImageError:
        raise ValueError(f"{file} is not an image that can be read") from None
    return pixels.reshape(*pixels.shape[:2], channels)


def _read_clip(file, num_frames):
    from tokenlearner_keras.data import clip_indices, read_video

    if file.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(f"{file} is an image, and the model takes clips")
    frames = read_video(file).frames
    if num_frames is None:
        return frames
    # Spread over the whole video; a short one is repeated.
    if len(frames) >= num_frames:
        indices = np.linspace(0, len(frames) - 1, num_frames).round().astype(int)
    else:
        indices = clip_indices(len(frames), num_frames)
    return frames[indices]
