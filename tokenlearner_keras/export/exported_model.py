"""One way to run exported models, whatever their format."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tokenlearner_keras.layers._checks import check_choice, check_positive_int

# Format → suffix of its path. A SavedModel is a folder.
SUFFIXES = {
    "saved_model": "",
    "litert": ".tflite",
    "onnx": ".onnx",
    "openvino": ".xml",
}


def resolve_format(path: Path, format: str | None) -> str:
    """Returns `format`, or the format that the suffix of `path` stands for."""
    if format is not None:
        return check_choice("format", format, tuple(SUFFIXES))
    by_suffix = {suffix: name for name, suffix in SUFFIXES.items()}
    return by_suffix.get(path.suffix, "saved_model")


def exported_files(path: Path) -> list[Path]:
    """Returns the files of an exported model; for a single file, `path` comes first."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.suffix == SUFFIXES["openvino"]:
        return [path, path.with_suffix(".bin")]
    return [path]


class ExportedModel:
    """An exported model: arrays in, named arrays out.

    Attributes:
        path: Its file or folder.
        format: `"saved_model"`, `"litert"`, `"onnx"` or `"openvino"`.
        inputs: Dictionary from the name of each input to `(shape, dtype)`; `None` is a
            free axis.
        outputs: The same of the outputs.
    """

    def __init__(self, path, format, inputs, outputs, function):
        self.path = path
        self.format = format
        self.inputs = inputs
        self.outputs = outputs
        self._function = function

    def __call__(self, images) -> dict[str, np.ndarray]:
        """Runs the model once, on one batch.

        Args:
            images: Array for the model's input, or a dictionary from input names.

        Returns:
            Dictionary from output names to arrays.

        Raises:
            ValueError: for inputs whose names, shapes or dtypes do not fit.
        """
        if not isinstance(images, Mapping):
            images = {next(iter(self.inputs)): images}
        if set(images) != set(self.inputs):
            raise ValueError(
                f"The inputs of {self.path} are {sorted(self.inputs)}. "
                f"Received: {sorted(images)}"
            )
        arrays = {}
        for name, value in images.items():
            shape, dtype = self.inputs[name]
            value = np.asarray(value)
            same_kind = value.dtype.name == dtype or (
                dtype == "string" and value.dtype.kind in "OSU"
            )
            same_shape = len(value.shape) == len(shape) and all(
                expected in (None, size) for expected, size in zip(shape, value.shape)
            )
            if not same_kind or not same_shape:
                raise ValueError(
                    f"Input '{name}' of {self.path} must be {dtype} of shape {shape}. "
                    f"Received: {value.dtype} of shape {value.shape}"
                )
            arrays[name] = value
        return self._function(arrays)

    def predict(self, images, batch_size: int = 32) -> dict[str, np.ndarray]:
        """Runs the model batch by batch.

        Args:
            images: Array for the model's only input.
            batch_size: int. Largest batch. A batch size that the model fixes goes
                first, and is filled by repeating the last image.

        Returns:
            Dictionary from output names to arrays.
        """
        check_positive_int("batch_size", batch_size)
        images = np.asarray(images)
        if not len(images):
            raise ValueError("Argument `images` must hold at least one example.")
        ((shape, _),) = self.inputs.values()
        fixed = shape[0]
        step = fixed or batch_size
        results = []
        for start in range(0, len(images), step):
            batch = images[start : start + step]
            size = len(batch)
            if fixed:
                batch = np.concatenate([batch, np.repeat(batch[-1:], fixed - size, 0)])
            results.append({name: value[:size] for name, value in self(batch).items()})
        return {
            name: np.concatenate([result[name] for result in results])
            for name in results[0]
        }


def load_exported(
    path: str | Path, signature: str | None = None, num_threads: int | None = None
) -> ExportedModel:
    """Loads an exported model with the runtime of its format.

    The runtimes are TensorFlow, ai-edge-litert, onnxruntime and openvino. They compute
    in float32 on the CPU.

    Args:
        path: A `.tflite`, `.onnx` or `.xml` file, or the folder of a SavedModel.
        signature: Name of the signature of a SavedModel; `None` takes
            `serving_default`. The other formats have one signature.
        num_threads: int or `None`. CPU threads; TensorFlow's can be set only before it
            has run anything.

    Returns:
        An `ExportedModel`.

    Raises:
        ValueError: for a path that does not exist or is no exported model, or a
            signature that it does not have.
    """
    path = Path(path)
    format = resolve_format(path, None)
    if num_threads is not None:
        check_positive_int("num_threads", num_threads)
    if format != "saved_model" and signature is not None:
        raise ValueError(
            f"Format '{format}' has a single signature, so `signature` must be None. "
            f"Received: signature={signature!r}"
        )
    marker = path / "saved_model.pb" if format == "saved_model" else path
    if not marker.is_file():
        raise ValueError(
            f"There is no exported model at {path}: expected a file with suffix "
            ".tflite, .onnx or .xml, or a folder with a `saved_model.pb`"
        )
    arguments = (signature,) if format == "saved_model" else ()
    inputs, outputs, function = LOADERS[format](path, num_threads, *arguments)
    return ExportedModel(path, format, inputs, outputs, function)


def _load_saved_model(path, num_threads, signature):
    import tensorflow as tf

    if num_threads is not None:
        tf.config.threading.set_intra_op_parallelism_threads(num_threads)
    restored = tf.saved_model.load(str(path))
    name = signature or "serving_default"
    if name not in restored.signatures:
        raise ValueError(
            f"Argument `signature` must be one of {sorted(restored.signatures)}, the "
            f"signatures of {path}. Received: signature={signature!r}"
        )
    function = restored.signatures[name]

    def run(arrays, keep=restored):  # `restored` owns the variables.
        tensors = {name: tf.constant(value) for name, value in arrays.items()}
        try:
            outputs = function(**tensors)
        except tf.errors.InvalidArgumentError as error:
            # Bytes that are no image, with `preprocessing="jpeg_bytes"`.
            raise ValueError(f"{path} refuses its input: {error.message}") from None
        return {name: value.numpy() for name, value in outputs.items()}

    def describe(specs):
        return {
            name: (
                None if spec.shape.rank is None else tuple(spec.shape),
                spec.dtype.name,
            )
            for name, spec in specs.items()
        }

    inputs = function.structured_input_signature[1]
    return describe(inputs), describe(function.structured_outputs), run


def _load_litert(path, num_threads):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=num_threads)
    runner = interpreter.get_signature_runner()

    def describe(details):
        return {
            name: (_free(detail["shape_signature"]), np.dtype(detail["dtype"]).name)
            for name, detail in details.items()
        }

    def run(arrays, keep=interpreter):
        return runner(**arrays)

    return (
        describe(runner.get_input_details()),
        describe(runner.get_output_details()),
        run,
    )


def _load_onnx(path, num_threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or os.cpu_count()
    session = onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )
    dtypes = {"tensor(float)": "float32", "tensor(float16)": "float16"}

    def describe(values):
        return {
            value.name: (
                _free(value.shape),
                dtypes.get(value.type, value.type.removeprefix("tensor(")[:-1]),
            )
            for value in values
        }

    outputs = describe(session.get_outputs())

    def run(arrays):
        return dict(zip(outputs, session.run(list(outputs), arrays)))

    return describe(session.get_inputs()), outputs, run


def _load_openvino(path, num_threads):
    import openvino

    # Without the hint a CPU with bfloat16 instructions rounds to them.
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    if num_threads is not None:
        options["INFERENCE_NUM_THREADS"] = num_threads
    compiled = openvino.Core().compile_model(path, "CPU", options)

    def describe(ports):
        return {
            port.any_name: (
                _free(
                    -1 if axis.is_dynamic else axis.get_length()
                    for axis in port.partial_shape
                ),
                np.dtype(port.element_type.to_dtype()).name,
            )
            for port in ports
        }

    outputs = describe(compiled.outputs)

    def run(arrays):
        results = compiled(arrays)
        return {name: results[name] for name in outputs}

    return describe(compiled.inputs), outputs, run


def _free(shape):
    """Returns a shape with `None` for every free axis, however that is written."""
    return tuple(
        int(axis) if isinstance(axis, (int, np.integer)) and axis >= 0 else None
        for axis in shape
    )


LOADERS = {
    "saved_model": _load_saved_model,
    "litert": _load_litert,
    "onnx": _load_onnx,
    "openvino": _load_openvino,
}
