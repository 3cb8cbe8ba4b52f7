"""SavedModels that run where neither this package nor Keras is installed."""

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import keras

from tokenlearner_keras.data.images import preprocess_images
from tokenlearner_keras.layers._checks import check_choice
from tokenlearner_keras.visualization import attention_tensors

DEFAULT_SIGNATURES = ("serve", "features", "attention_maps")
SIGNATURES = (*DEFAULT_SIGNATURES, "explain", "train")
PREPROCESSINGS = (None, "uint8", "jpeg_bytes")
OUTPUT_ACTIVATIONS = ("auto", "softmax", "sigmoid", None)
CLASS_NAMES_FILE = "class_names.txt"


def export_saved_model(
    model: keras.Model,
    path: str | Path,
    signatures: Sequence[str] = DEFAULT_SIGNATURES,
    preprocessing: str | None = None,
    class_names: Sequence[str] | None = None,
    value_range: tuple[float, float] = (-1.0, 1.0),
    output_activation: str | None = "auto",
    feature_layer: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a model as a SavedModel with named signatures and a flexible batch.

    The folder is written beside `path` and then renamed, so that `path` never holds
    half a model.

    Args:
        model: A functional model with one input, `(batch, height, width, channels)` or
            `(batch, time, height, width, channels)`, and one output.
        path: Folder to write.
        signatures: Those of the following that the SavedModel gets. The first is also
            its `serving_default`.

            - `"serve"`: output `probabilities`, what `model` returns, after
              `output_activation`.
            - `"features"`: output `features`, what enters the classification head.
            - `"attention_maps"`: output `attention_maps`, the maps of the first
              `TokenLearner`, and `attention_maps_1`, ... for those behind it.
            - `"explain"`: the outputs of `"serve"` and `"attention_maps"` at once.
            - `"train"`: output `outputs`, what `model` returns in training mode, with
              dropout. Gradients flow from it to `trainable_variables` of the loaded
              SavedModel, which all signatures share, so that any TensorFlow process
              can fine-tune the model.
        preprocessing: What the signatures take.

            - `None`: input `images`, exactly as `model` takes them.
            - `"uint8"`: input `images`, uint8 images or clips of any one size, which
              are resized and scaled to `value_range`.
            - `"jpeg_bytes"`: input `image_bytes`, a batch of strings: encoded images
              (JPEG, PNG, BMP or GIF, first frame) of any sizes, which are decoded as
              well. Image models only.
        class_names: The name of each output. Written one a line to
            `assets/class_names.txt`.
        value_range: What the pixel values 0 and 255 become, with `preprocessing`: what
            `model` was trained on.
        output_activation: `"softmax"` or `"sigmoid"`: turns the logits that `model`
            returns into probabilities. `None`: `model` returns probabilities already.
            `"auto"`: `None` if its last layer has one of these activations, else
            `"softmax"`.
        feature_layer: Name of the layer whose output is `features`. `None` takes what
            enters the `Dense` layer that ends the model, or the output of a model that
            does not end with one.
        overwrite: bool. Whether `path` may exist; it is replaced once the new folder is
            complete.

    Returns:
        The folder, a `Path`.

    Raises:
        ValueError: for a model that is not built or not functional, a signature that is
            unknown or that the model cannot have, a `path` that exists, or class names
            that do not fit the outputs.
    """
    signatures = _check_signatures(signatures)
    check_choice("preprocessing", preprocessing, PREPROCESSINGS)
    check_choice("output_activation", output_activation, OUTPUT_ACTIVATIONS)
    path = Path(path)
    _check_path(path, overwrite)
    _check_model(model)
    _check_preprocessing(model, preprocessing)
    if class_names is not None:
        class_names = _check_class_names(model, class_names)
    outputs = {
        signature: _output_tensors(model, signature, output_activation, feature_layer)
        for signature in signatures
    }

    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    beside.mkdir(parents=True)
    try:
        folder = beside / "saved_model"
        _write(model, folder, outputs, preprocessing, value_range, class_names)
        _replace(folder, path, beside / "old")
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return path


def _write(model, folder, outputs, preprocessing, value_range, class_names):
    import tensorflow as tf

    spec, prepare = _input_spec(model, preprocessing, value_range)
    archive = keras.export.ExportArchive()
    archive.track(model)
    # `track` collects Keras's variables and the signatures the TensorFlow variables
    # inside them; each kind would be written, so that all weights stood there twice.
    for name in ("variables", "trainable_variables", "non_trainable_variables"):
        variables = [variable.value for variable in getattr(model, name)]
        archive.add_variable_collection(name, variables)
    for signature, tensors in outputs.items():
        archive.add_endpoint(
            signature,
            _endpoint(
                keras.Model(model.inputs, tensors), prepare, signature == "train"
            ),
            input_signature=[spec],
        )
    if class_names is not None:
        # A table that is read from a file makes the file an asset of the SavedModel.
        file = folder.parent / CLASS_NAMES_FILE
        file.write_text("\n".join(class_names) + "\n", encoding="utf-8")
        archive.track(
            tf.lookup.StaticHashTable(
                tf.lookup.TextFileInitializer(
                    str(file),
                    tf.int64,
                    tf.lookup.TextFileIndex.LINE_NUMBER,
                    tf.string,
                    tf.lookup.TextFileIndex.WHOLE_LINE,
                ),
                default_value="",
            )
        )
    archive.write_out(str(folder), verbose=False)


def _endpoint(model, prepare, training):
    def endpoint(images):
        return model(prepare(images), training=training)

    return endpoint


def _input_spec(model, preprocessing, value_range):
    """Returns the input of the signatures and the function from it to the model's."""
    import tensorflow as tf

    (tensor,) = model.inputs
    shape = (None, *tensor.shape[1:])
    if preprocessing is None:
        return tf.TensorSpec(shape, tensor.dtype, name="images"), lambda images: images
    *_, height, width, channels = shape

    def resize(images):
        # The frames of a clip join the batch: images are resized one by one.
        lead = tf.shape(images)[:-3]
        flat = tf.reshape(images, tf.concat([[-1], tf.shape(images)[-3:]], axis=0))
        flat.set_shape((None, None, None, channels))
        flat = preprocess_images(flat, (height, width), value_range)
        resized = tf.reshape(flat, tf.concat([lead, [height, width, channels]], axis=0))
        return tf.ensure_shape(tf.cast(resized, tensor.dtype), shape)

    def decode(encoded):
        image = tf.io.decode_image(encoded, channels, expand_animations=False)
        image.set_shape((None, None, channels))
        return preprocess_images(image, (height, width), value_range)

    def decode_all(image_bytes):
        images = tf.map_fn(
            decode,
            image_bytes,
            fn_output_signature=tf.TensorSpec((height, width, channels), "float32"),
        )
        return tf.cast(images, tensor.dtype)

    if preprocessing == "uint8":
        free = (*shape[:-3], None, None, channels)
        return tf.TensorSpec(free, "uint8", name="images"), resize
    return tf.TensorSpec((None,), "string", name="image_bytes"), decode_all


def _output_tensors(model, signature, output_activation, feature_layer):
    """Returns the named symbolic outputs of one signature."""
    if signature == "serve":
        return {"probabilities": _probabilities(model, output_activation)}
    if signature == "features":
        return {"features": _features(model, feature_layer)}
    if signature == "train":
        return {"outputs": keras.ops.cast(model.outputs[0], "float32")}
    if signature == "explain":
        return _output_tensors(
            model, "serve", output_activation, feature_layer
        ) | _output_tensors(model, "attention_maps", output_activation, feature_layer)
    tensors = list(attention_tensors(model).values())
    if not tensors:
        raise ValueError(
            f"Model '{model.name}' has no `TokenLearner`, so it has no attention maps: "
            "leave 'attention_maps' and 'explain' out of `signatures`. "
            "A model without it takes signatures=('serve', 'features')."
        )
    names = ["attention_maps", *(f"attention_maps_{i}" for i in range(1, len(tensors)))]
    return {
        name: keras.ops.cast(tensor, "float32") for name, tensor in zip(names, tensors)
    }


def _probabilities(model, output_activation):
    (outputs,) = model.outputs
    if output_activation == "auto":
        last = getattr(outputs._keras_history.operation, "activation", None)
        done = (keras.activations.softmax, keras.activations.sigmoid)
        is_softmax = isinstance(outputs._keras_history.operation, keras.layers.Softmax)
        output_activation = None if last in done or is_softmax else "softmax"
    # Probabilities need float32 even where the model computes in bfloat16.
    outputs = keras.ops.cast(outputs, "float32")
    if output_activation is None:
        return outputs
    return keras.layers.Activation(output_activation, dtype="float32")(outputs)


def _features(model, feature_layer):
    if feature_layer is not None:
        names = [layer.name for layer in model.layers]
        if feature_layer not in names:
            raise ValueError(
                f"Argument `feature_layer` must name a layer of model '{model.name}', "
                f"one of {names}. Received: feature_layer={feature_layer!r}"
            )
        features = model.get_layer(feature_layer).output
    else:
        features = _head_input(model.outputs[0])
    return keras.ops.cast(features, "float32")


def _head_input(tensor):
    """Returns what enters the `Dense` layer behind `tensor`, or `tensor` itself."""
    operation, node_index, _ = tensor._keras_history
    inputs = operation._inbound_nodes[node_index].input_tensors
    if isinstance(operation, keras.layers.Dense):
        return inputs[0]
    if isinstance(operation, (keras.layers.Activation, keras.layers.Softmax)):
        head = _head_input(inputs[0])
        return tensor if head is inputs[0] else head
    return tensor


def _check_signatures(signatures):
    if isinstance(signatures, str):
        signatures = (signatures,)
    signatures = tuple(signatures)
    unknown = [s for s in signatures if s not in SIGNATURES]
    if not signatures or unknown or len(set(signatures)) < len(signatures):
        raise ValueError(
            f"Argument `signatures` must list some of {SIGNATURES}, each once. "
            f"Received: signatures={signatures}"
        )
    return signatures


def _check_path(path, overwrite):
    if path.exists() and not overwrite:
        raise ValueError(
            f"The path {path} exists already. Pass `overwrite=True` to replace it."
        )
    if path.exists() and not (path / "saved_model.pb").is_file():
        raise ValueError(
            f"The path {path} exists and is not a SavedModel, so it is not replaced."
        )
    check_writable(path)


def check_writable(path: Path):
    """Raises a `ValueError` if nothing can be written at `path`."""
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(
            f"The path {path} cannot be written: {parent} is not writable."
        )


def _check_model(model):
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "SavedModels are written with Keras's TensorFlow backend. Received: "
            f"backend '{keras.backend.backend()}'"
        )
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Argument `model` must be a `keras.Model`. Received: model={model!r}"
        )
    if not model.built:
        raise ValueError(
            f"Model '{model.name}' is not built yet: call it on a batch, or give it an "
            "`Input`, before it is exported."
        )
    if not getattr(model, "inputs", None):
        raise ValueError(
            f"Model '{model.name}' must be functional. Received: model={model!r} of "
            f"type {type(model).__name__}"
        )
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            f"Model '{model.name}' must have one input and one output. Received: "
            f"{len(model.inputs)} inputs and {len(model.outputs)} outputs"
        )


def _check_preprocessing(model, preprocessing):
    if preprocessing is None:
        return
    shape = tuple(model.inputs[0].shape)
    ranks = (4,) if preprocessing == "jpeg_bytes" else (4, 5)
    if len(shape) not in ranks or None in shape[-3:]:
        raise ValueError(
            f"`preprocessing={preprocessing!r}` needs a model whose input has rank "
            f"{' or '.join(map(str, ranks))} and a fixed height, width and number of "
            f"channels. Received: an input of shape {shape}"
        )
    if preprocessing == "jpeg_bytes" and shape[-1] not in (1, 3, 4):
        raise ValueError(
            "`preprocessing='jpeg_bytes'` needs a model for images of 1, 3 or 4 "
            f"channels. Received: an input of shape {shape}"
        )


def _check_class_names(model, class_names):
    class_names = [str(name) for name in class_names]
    num_outputs = model.outputs[0].shape[-1]
    if len(class_names) != num_outputs:
        raise ValueError(
            "Argument `class_names` must have one name for each output of the model, "
            f"{num_outputs}. Received: {len(class_names)} names"
        )
    if any("\n" in name for name in class_names):
        raise ValueError("The names in `class_names` must not contain line breaks.")
    return class_names


def _replace(folder, path, aside):
    """Renames `folder` to `path`; what stands there is moved aside first."""
    if path.exists():
        os.replace(path, aside)
    try:
        os.replace(folder, path)
    except OSError:
        if aside.exists():
            os.replace(aside, path)
        raise
