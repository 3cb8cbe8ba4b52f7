"""Files for LiteRT, ONNX Runtime and OpenVINO, and their size and accuracy."""

import contextlib
import dataclasses
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tokenlearner_keras.export import saved_model
from tokenlearner_keras.export.exported_model import (
    SUFFIXES,
    exported_files,
    load_exported,
    resolve_format,
)
from tokenlearner_keras.layers._checks import check_choice, check_positive_int
from tokenlearner_keras.ops import force_vector_attention_method

QUANTIZATIONS = (None, "int8", "float16")
VECTOR_ATTENTION_METHODS = ("interpolated", "streaming", "dense")


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `export_model` wrote, and what it found out about it.

    Attributes:
        path: The file, or the folder of a SavedModel.
        format: `"saved_model"`, `"litert"`, `"onnx"` or `"openvino"`.
        quantize: The number format of the weights, as given to `export_model`.
        num_bytes: Size on disk, of all its files.
        seconds: Time that the export took.
        max_difference: Largest absolute difference between the probabilities of the
            written model, run by its own runtime, and those of the Keras model, on
            `check_data`. `None` without it.
        accuracy: Fraction of `check_data` whose largest probability in the written
            model is that of its label. `None` without labels.
        reference_accuracy: The same of the Keras model.
    """

    path: Path
    format: str
    quantize: str | None
    num_bytes: int
    seconds: float
    max_difference: float | None = None
    accuracy: float | None = None
    reference_accuracy: float | None = None

    def __str__(self):
        lines = [
            f"{self.path} ({self.format}, weights: {self.quantize or 'as trained'})",
            f"size: {self.num_bytes / 1e6:.2f} MB, written in {self.seconds:.1f} s",
        ]
        if self.max_difference is not None:
            lines.append(f"largest difference from Keras: {self.max_difference:.3g}")
        if self.accuracy is not None:
            lines.append(
                f"accuracy: {self.accuracy:.4f} (Keras: {self.reference_accuracy:.4f})"
            )
        return "\n".join(lines)


def export_model(
    model: keras.Model,
    path: str | Path,
    format: str | None = None,
    signatures: Sequence[str] = ("serve",),
    quantize: str | None = None,
    batch_size: int | None = None,
    output_activation: str | None = "auto",
    feature_layer: str | None = None,
    check_data: Any = None,
    overwrite: bool = False,
    vector_attention_method: str = "interpolated",
) -> ExportReport:
    """Writes a model for LiteRT, ONNX Runtime, OpenVINO or as a SavedModel.

    The file is written beside `path` and then renamed. No format gets custom
    operations: LiteRT files hold built-in operations only.

    Args:
        model: A functional model with one input, `(batch, height, width, channels)` or
            `(batch, time, height, width, channels)`, and one output. It is not changed.
        path: What to write: a `.tflite`, `.onnx` or `.xml` file (OpenVINO puts the
            weights beside it, in a `.bin` file), or the folder of a SavedModel.
        format: `"saved_model"`, `"litert"`, `"onnx"` or `"openvino"`. `None` takes it
            from the suffix of `path`.
        signatures: Which outputs the file has, as in `export_saved_model`: `"serve"`
            (`probabilities`), `"features"` and `"attention_maps"`. A file has one
            function, from `images` to all of them; a SavedModel has one for each.
        quantize: The number format in which the weights are stored.

            - `None`: as the model has them.
            - `"int8"`: `Dense` and `EinsumDense` kernels are rounded by
              `keras.Model.quantize` to int8, with one scale for each output channel;
              activations stay float32.
            - `"float16"`: not for SavedModels.
        batch_size: int or `None`. A fixed batch size, which some runtimes need or run
            faster. `None` leaves it free. Not for SavedModels, whose batch is free.
        output_activation: As in `export_saved_model`.
        feature_layer: As in `export_saved_model`.
        check_data: Images (or clips) as the model takes them, or a pair of images and
            integer labels, to run both models on: fills in the report. Needs the
            format's runtime, and `"serve"`.
        overwrite: bool. Whether `path` may exist.
        vector_attention_method: What `VectorAttention` layers with `method="auto"`
            become in a file, which cannot choose while it runs: `"interpolated"`
            (linear time; NaN for inputs that are too large for it, where `"auto"` would
            change its method), `"streaming"` or `"dense"`. A SavedModel keeps
            `"auto"`.

    Returns:
        An `ExportReport`.

    Raises:
        ValueError: for a model that is not built or not functional, an unknown
            signature, format or quantization, a `path` that exists or has another
            format's suffix, or a model whose activations are quantized, for a format
            that cannot hold them.
    """
    path = Path(path)
    format = resolve_format(path, format)
    signatures = saved_model._check_signatures(signatures)
    check_choice("quantize", quantize, QUANTIZATIONS)
    check_choice(
        "vector_attention_method", vector_attention_method, VECTOR_ATTENTION_METHODS
    )
    if batch_size is not None:
        check_positive_int("batch_size", batch_size)
    _check_format(path, format, signatures, quantize, batch_size)
    saved_model._check_model(model)
    _check_activations(model, format)
    _check_check_data(check_data, signatures)
    if format != "saved_model":
        _check_file(path, overwrite)
        check_choice(
            "output_activation", output_activation, saved_model.OUTPUT_ACTIVATIONS
        )

    start = time.perf_counter()
    source = _quantized(model) if quantize == "int8" else model
    if format == "saved_model":
        saved_model.export_saved_model(
            source,
            path,
            signatures,
            output_activation=output_activation,
            feature_layer=feature_layer,
            overwrite=overwrite,
        )
    else:
        outputs = {}
        for signature in signatures:
            outputs |= saved_model._output_tensors(
                source, signature, output_activation, feature_layer
            )
        named = _single_function(source, outputs)
        beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        beside.mkdir(parents=True)
        try:
            file = beside / path.name
            with force_vector_attention_method(vector_attention_method):
                WRITERS[format](named, file, quantize, batch_size)
            # The weights first: whoever sees the new model sees its weights too.
            for written, target in zip(
                reversed(exported_files(file)), reversed(exported_files(path))
            ):
                os.replace(written, target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    report = ExportReport(
        path,
        format,
        quantize,
        sum(file.stat().st_size for file in exported_files(path)),
        time.perf_counter() - start,
    )
    if check_data is None:
        return report
    return dataclasses.replace(
        report, **_compare(model, path, check_data, output_activation, batch_size)
    )


def _single_function(model, outputs):
    """Returns a model with an input called `images` and named outputs."""
    (tensor,) = model.inputs
    images = keras.Input(tensor.shape[1:], dtype=tensor.dtype, name="images")
    return keras.Model(images, keras.Model(model.inputs, outputs)(images))


def _input_signature(model, batch_size):
    (tensor,) = model.inputs
    shape = (batch_size, *tensor.shape[1:])
    import tensorflow as tf

    return [tf.TensorSpec(shape, tensor.dtype, name="images")]


def _write_litert(model, path, quantize, batch_size):
    import tensorflow as tf

    target = {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}
    arguments = {}
    if quantize == "float16":
        target["supported_types"] = [tf.float16]
        arguments["optimizations"] = [tf.lite.Optimize.DEFAULT]
    with _quiet():
        model.export(
            str(path),
            format="litert",
            input_signature=_input_signature(model, batch_size),
            target_spec=target,
            verbose=False,
            **arguments,
        )


def _write_onnx(model, path, quantize, batch_size):
    import onnx

    with _quiet(), _selections_are_exact():
        model.export(
            str(path),
            format="onnx",
            input_signature=_input_signature(model, batch_size),
            verbose=False,
        )
    proto = onnx.load(str(path))
    for value in (*proto.graph.input, *proto.graph.output):
        dimension = value.type.tensor_type.shape.dim[0]
        if dimension.dim_param:
            dimension.dim_param = "batch"
    _store_onnx_weights(proto, quantize)
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))


@contextlib.contextmanager
def _selections_are_exact():
    """Has tf2onnx write `where(condition, a, b)` as ONNX's `Where`.

    It writes `condition * a + (1 - condition) * b`, which is NaN for an infinite `a` or
    `b` that is not chosen, unless it sees that one of them is a constant.
    """
    import onnx
    from tf2onnx.onnx_opset.controlflow import Select

    by_products = Select.version_7

    def select(ctx, node, **kwargs):
        if ctx.get_dtype(node.output[0]) not in (
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.DOUBLE,
        ):
            return by_products(ctx, node, **kwargs)
        node.set_attr("handles_nan", True)
        Select.version_9(ctx, node, **kwargs)
        del node.attr["handles_nan"]

    Select.version_7 = select
    try:
        yield
    finally:
        Select.version_7 = by_products


def _store_onnx_weights(proto, quantize):
    """Stores weights in few bytes, each behind a `Cast` to what the graph expects."""
    import onnx

    casts = []
    for tensor in proto.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        small = _small(onnx.numpy_helper.to_array(tensor), quantize)
        if small is None:
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(small, f"{name}/{small.dtype}"))
        casts.append(
            onnx.helper.make_node(
                "Cast", [tensor.name], [name], f"{name}/cast", to=onnx.TensorProto.FLOAT
            )
        )
    # Nodes stand in the order of execution.
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _write_openvino(model, path, quantize, batch_size):
    import openvino

    with _quiet():
        model.export(
            str(path),
            format="openvino",
            input_signature=_input_signature(model, batch_size),
            verbose=False,
        )
    if quantize is None:
        return
    # A copy in memory: the file that is read from is written again.
    core = openvino.Core()
    core.set_property({"ENABLE_MMAP": False})
    graph = core.read_model(path)
    from openvino import opset13

    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Constant":
            continue
        if node.get_element_type() != openvino.Type.f32:
            continue
        small = _small(np.array(node.data), quantize)
        if small is None:
            continue
        uses = node.output(0).get_target_inputs()
        cast = opset13.convert(opset13.constant(small), "f32").output(0)
        for use in uses:
            use.replace_source_output(cast)
    openvino.serialize(graph, path)


def _small(values, quantize):
    """Returns float32 weights in fewer bytes, or `None` where that would lose more."""
    # Scales, biases and constants of the graph are small, and matter most.
    if values.size < 1024:
        return None
    if quantize == "float16":
        return values.astype("float16")
    if quantize == "int8":
        # The converters unpack Keras's int8 kernels to whole float32 numbers.
        rounded = values.astype("int8")
        if np.array_equal(rounded, values):
            return rounded
    return None


WRITERS = {
    "litert": _write_litert,
    "onnx": _write_onnx,
    "openvino": _write_openvino,
}


@contextlib.contextmanager
def _quiet():
    with warnings.catch_warnings():
        # Keras's patch of tf2onnx touches `np.object`; a subclass of `dict` inputs.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def _quantized(model):
    """Returns a copy of `model` with int8 kernels and float32 activations.

    Keras's default quantizes the activations as well, batch by batch: LiteRT cannot
    hold such a model, OpenVINO computes wrong numbers from it, and it runs at half
    the speed of float32 in TensorFlow on a CPU.
    """
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    with warnings.catch_warnings():
        # One warning for every layer that has nothing to quantize.
        warnings.filterwarnings("ignore", message=".*does not have a `quantize`.*")
        copy.quantize(
            config=keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
        )
    return copy


def _compare(model, path, check_data, output_activation, batch_size):
    images, labels = check_data if isinstance(check_data, tuple) else (check_data, None)
    images = np.asarray(images)
    tensors = saved_model._output_tensors(model, "serve", output_activation, None)
    reference = keras.Model(model.input, tensors["probabilities"])
    exported = load_exported(path)
    expected, actual = [], []
    step = batch_size or 32
    for start in range(0, len(images), step):
        batch = images[start : start + step]
        # Eager: tracing a whole model would take longer than a few batches of it.
        outputs = reference(batch, training=False)
        expected.append(keras.ops.convert_to_numpy(outputs))
        actual.append(exported.predict(batch, step)["probabilities"])
    expected, actual = np.concatenate(expected), np.concatenate(actual)
    results = {"max_difference": float(np.max(np.abs(actual - expected)))}
    if labels is not None:
        labels = np.asarray(labels)
        for name, scores in (("accuracy", actual), ("reference_accuracy", expected)):
            results[name] = float(np.mean(np.argmax(scores, axis=-1) == labels))
    return results


def _check_format(path, format, signatures, quantize, batch_size):
    suffix = SUFFIXES[format]
    if path.suffix != suffix and (suffix or path.suffix in SUFFIXES.values()):
        raise ValueError(
            f"The path of format '{format}' must "
            + (f"end with '{suffix}'" if suffix else "be a folder")
            + f". Received: path={str(path)!r}"
        )
    if format != "saved_model" and "train" in signatures:
        raise ValueError(
            "'train' is a signature of SavedModels alone. "
            f"Received: format={format!r}, signatures={signatures}"
        )
    if format == "saved_model" and quantize == "float16":
        raise ValueError(
            "SavedModels are written with `quantize=None` or `quantize='int8'`. "
            "Received: quantize='float16'"
        )
    if format == "saved_model" and batch_size is not None:
        raise ValueError(
            "SavedModels have a free batch: `batch_size` must be None. "
            f"Received: batch_size={batch_size}"
        )


def _check_activations(model, format):
    """Refuses int8 activations where they are lost or computed wrongly."""
    if format not in ("litert", "openvino"):
        return
    quantized = [
        layer.path
        for layer in model._flatten_layers()
        if getattr(layer, "quantization_mode", None) in ("int8", "int4")
        and getattr(layer, "inputs_quantizer", None) is not None
    ]
    if quantized:
        raise ValueError(
            f"Model '{model.name}' has int8 activations ({quantized[0]} and "
            f"{len(quantized) - 1} other layers), which format '{format}' cannot run. "
            "Pass the float model with `quantize='int8'`, or quantize it with "
            "`keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)`."
        )


def _check_check_data(check_data, signatures):
    if check_data is not None and "serve" not in signatures:
        raise ValueError(
            "Argument `check_data` compares probabilities and so needs 'serve' among "
            f"the signatures. Received: signatures={signatures}"
        )


def _check_file(path, overwrite):
    if path.is_dir():
        raise ValueError(f"The path {path} is a folder.")
    for file in exported_files(path):
        if file.exists() and not overwrite:
            raise ValueError(
                f"The path {file} exists already. Pass `overwrite=True` to replace it."
            )
    saved_model.check_writable(path)
