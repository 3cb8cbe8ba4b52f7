import os

import keras
import numpy as np
import pytest

from tests.contract import random_like, randomize_weights
from tokenlearner_keras.export import export_model, load_exported
from tokenlearner_keras.layers import TokenLearner, VectorAttention
from tokenlearner_keras.models import (
    ViTConfig,
    X2Plus1DConfig,
    vit,
    vivit,
    x2plus1d,
)
from tokenlearner_keras.visualization import attention_maps

pytestmark = pytest.mark.tensorflow

FILES = {"litert": "m.tflite", "onnx": "m.onnx", "openvino": "m.xml"}
SIGNATURES = ("serve", "features", "attention_maps")


def small_model():
    inputs = keras.Input((8, 8, 3), name="anything")
    x = keras.layers.Conv2D(32, 2, strides=2)(inputs)
    x = TokenLearner.v11(4)(x)
    x = keras.layers.Dense(64)(x)
    x = keras.layers.GlobalAveragePooling1D(name="pool")(x)
    model = keras.Model(inputs, keras.layers.Dense(5, name="head")(x), name="small")
    randomize_weights(model)
    return model


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def call(model, images):
    return keras.ops.convert_to_numpy(model(images, training=False))


def expected_outputs(model, images):
    # What enters the head is the output of the layer before it.
    features = keras.Model(model.input, model.layers[-1].input)
    return {
        "probabilities": softmax(call(model, images)),
        "features": call(features, images),
    }


def run_litert(path, images):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    names = [op["op_name"] for op in interpreter._get_ops_details()]
    # TensorFlow operations inside a LiteRT file are named `Flex...`.
    assert not [n for n in names if n.startswith("Flex") or "CUSTOM" in n.upper()]
    return interpreter.get_signature_runner()(images=images)


def run_onnx(path, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    (value,) = session.get_inputs()
    assert (value.name, value.shape[1:]) == ("images", list(images.shape[1:]))
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images})))


def run_openvino(path, images):
    import openvino

    model = openvino.Core().compile_model(
        path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    outputs = model({"images": images})
    return {port.any_name: outputs[port] for port in model.outputs}


CLIENTS = {"litert": run_litert, "onnx": run_onnx, "openvino": run_openvino}


def assert_clients_agree(model, path, format, with_maps):
    shape = model.inputs[0].shape[1:]
    for batch in (1, 3):
        images = random_like((batch, *shape), seed=batch)
        actual = CLIENTS[format](path, images)
        expected = expected_outputs(model, images)
        if with_maps:
            expected["attention_maps"] = attention_maps(model, images)
        assert set(actual) == set(expected)
        for name, value in expected.items():
            assert actual[name].shape == value.shape
            scale = max(1.0, np.abs(value).max())
            np.testing.assert_allclose(actual[name], value, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("format", FILES)
def test_clients_agree_with_keras(format, tmp_path):
    model = small_model()
    path = tmp_path / "deep" / FILES[format]
    images, labels = random_like((6, 8, 8, 3)), np.arange(6) % 5
    report = export_model(
        model, path, signatures=SIGNATURES, check_data=(images, labels)
    )
    assert_clients_agree(model, path, format, with_maps=True)
    files = sorted(os.listdir(path.parent))
    assert files == (["m.bin", "m.xml"] if format == "openvino" else [path.name])
    assert (report.path, report.format, report.quantize) == (path, format, None)
    assert report.num_bytes == sum((path.parent / f).stat().st_size for f in files)
    assert report.seconds > 0
    assert report.max_difference <= 1e-5
    accuracy = np.mean(call(model, images).argmax(-1) == labels)
    assert report.accuracy == report.reference_accuracy == pytest.approx(accuracy)
    assert f"({format}, weights: as trained)" in str(report)
    # The package's own way to run it gives the same.
    exported = load_exported(path, num_threads=1)
    assert exported.inputs == {"images": ((None, 8, 8, 3), "float32")}
    assert exported.outputs["attention_maps"] == ((None, 4, 4, 4), "float32")
    outputs = exported.predict(images, batch_size=4)
    assert outputs["attention_maps"].shape == (6, 4, 4, 4)
    np.testing.assert_allclose(
        outputs["probabilities"], softmax(call(model, images)), atol=1e-5
    )


@pytest.mark.parametrize("format", [*FILES, "saved_model"])
def test_int8_weights(format, tmp_path):
    model = small_model()
    weights = model.get_weights()
    images = random_like((4, 8, 8, 3))
    path = tmp_path / FILES.get(format, "m")
    # Labels that the float model gets right three times of four.
    labels = call(model, images).argmax(-1)
    labels[0] = (labels[0] + 1) % 5
    report = export_model(model, path, quantize="int8", check_data=(images, labels))
    # The model itself stays as it was.
    for before, after in zip(weights, model.get_weights()):
        np.testing.assert_array_equal(before, after)
    # Keras's own quantized model is what the file computes, to float32's rounding.
    quantized = keras.models.clone_model(model)
    quantized.set_weights(weights)
    quantized.quantize(
        config=keras.quantizers.Int8QuantizationConfig(activation_quantizer=None)
    )
    exported = load_exported(path)
    expected = softmax(call(quantized, images))
    actual = exported(images)["probabilities"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    difference = np.abs(expected - softmax(call(model, images))).max()
    assert 1e-5 < difference < 0.05
    assert report.max_difference == pytest.approx(difference, abs=1e-5)
    assert report.reference_accuracy == 0.75
    assert report.accuracy == np.mean(expected.argmax(-1) == labels)
    text = str(report)
    assert f"accuracy: {report.accuracy:.4f} (Keras: 0.7500)" in text
    assert f"size: {report.num_bytes / 1e6:.2f} MB" in text
    assert "weights: int8" in text


def dense_model():
    """Nearly all of its bytes are one kernel."""
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Dense(1024, "relu")(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, keras.layers.Dense(5)(x))
    randomize_weights(model, scale=0.05)
    return model


@pytest.mark.parametrize("format", FILES)
def test_sizes_and_float16(format, tmp_path):
    model = dense_model()
    images = random_like((4, 8, 8, 3))
    reports = {
        quantize: export_model(
            model,
            tmp_path / str(quantize) / FILES[format],
            quantize=quantize,
            batch_size=2,
            check_data=images,
        )
        for quantize in (None, "float16", "int8")
    }
    size = 4 * sum(v.size for v in model.get_weights())
    assert size < reports[None].num_bytes < 1.1 * size
    assert reports["float16"].num_bytes < 0.6 * size
    assert reports["int8"].num_bytes < 0.35 * size
    assert reports[None].max_difference <= 1e-5
    assert 0 < reports["float16"].max_difference < 2e-3
    exported = load_exported(reports[None].path)
    assert exported.inputs == {"images": ((2, 8, 8, 3), "float32")}
    # A batch that is fixed is filled up.
    assert exported.predict(images[:3])["probabilities"].shape == (3, 5)


@pytest.mark.parametrize("format", FILES)
def test_infinities_that_are_not_chosen(format, tmp_path):
    """tf2onnx alone computes `0 * inf` here, which is NaN."""
    inputs = keras.Input((8, 8, 3))
    nothing = keras.ops.full_like(inputs, float("-inf"))
    x = keras.ops.where(inputs > 0, inputs, nothing)
    x = keras.ops.max(x, axis=(1, 2))
    model = keras.Model(inputs, keras.layers.Dense(5)(x))
    randomize_weights(model)
    path = tmp_path / FILES[format]
    export_model(model, path)
    images = random_like((3, 8, 8, 3))
    expected = softmax(call(model, images))
    assert np.isfinite(expected).all()
    actual = CLIENTS[format](path, images)["probabilities"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_wrong_inputs_of_an_exported_model(tmp_path):
    exported = load_exported(export_model(dense_model(), tmp_path / "m.onnx").path)
    with pytest.raises(ValueError, match=r"Input 'images' of .* must be float32") as e:
        exported(random_like((2, 9, 8, 3)))
    assert "(None, 8, 8, 3)" in str(e.value)
    assert "(2, 9, 8, 3)" in str(e.value)
    with pytest.raises(ValueError, match=r"Received: int32 of shape \(2, 8, 8, 3\)"):
        exported(np.zeros((2, 8, 8, 3), "int32"))
    with pytest.raises(ValueError, match=r"inputs of .* are \['images'\]. Received"):
        exported({"pictures": random_like((2, 8, 8, 3))})
    with pytest.raises(ValueError, match="at least one example"):
        exported.predict(random_like((0, 8, 8, 3)))


def test_loading_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no exported model at"):
        load_exported(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match=r"folder with a `saved_model.pb`"):
        load_exported(tmp_path)
    with pytest.raises(ValueError, match="`signature` must be None"):
        load_exported(tmp_path / "none.onnx", signature="serve")
    export_model(dense_model(), tmp_path / "m")
    with pytest.raises(ValueError, match=r"one of \['serve', 'serving_default'\]"):
        load_exported(tmp_path / "m", signature="features")


def test_a_path_that_exists(tmp_path):
    model = dense_model()
    (tmp_path / "m.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"m.bin exists already. Pass `overwrite="):
        export_model(model, tmp_path / "m.xml")
    assert os.listdir(tmp_path) == ["m.bin"]
    export_model(model, tmp_path / "m.xml", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["m.bin", "m.xml"]
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(ValueError, match=r"m.onnx is a folder"):
        export_model(model, tmp_path / "m.onnx", overwrite=True)


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    model = dense_model()
    (tmp_path / "m.onnx").write_bytes(b"old")

    def fail(*_, **__):
        raise RuntimeError("disk full")

    monkeypatch.setattr(keras.Model, "export", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        export_model(model, tmp_path / "m.onnx", overwrite=True)
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "m.tflite",
            {"format": "torch"},
            r"argument `format`. Expected one of \('saved_model'",
        ),
        ("m.onnx", {"format": "litert"}, r"must end with '.tflite'. Received"),
        ("m.onnx", {"format": "saved_model"}, r"must be a folder. Received"),
        ("m.onnx", {"signatures": ("predict",)}, r"must list some of \('serve'"),
        ("m.onnx", {"signatures": ("attention_maps",)}, "no `TokenLearner`"),
        (
            "m.onnx",
            {"quantize": "int4"},
            r"argument `quantize`. Expected one of \(None, 'int8'",
        ),
        ("m.onnx", {"batch_size": 0}, r"`batch_size` must be"),
        (
            "m.onnx",
            {"vector_attention_method": "auto"},
            r"argument `vector_attention_method`. Expected one of \('interpolated'",
        ),
        (
            "m.onnx",
            {"output_activation": "relu"},
            r"argument `output_activation`. Expected one of",
        ),
        ("m.onnx", {"signatures": ("train",)}, "'train' is a signature of SavedModels"),
        ("m", {"quantize": "float16"}, r"SavedModels are written with `quantize=None`"),
        ("m", {"batch_size": 2}, r"SavedModels have a free batch"),
        (
            "m.onnx",
            {"signatures": ("features",), "check_data": np.zeros((1, 8, 8, 3))},
            r"needs 'serve' among the signatures",
        ),
    ],
)
def test_invalid_arguments(name, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_model(dense_model(), tmp_path / name, **arguments)
    assert not os.listdir(tmp_path)


def test_models_that_cannot_be_exported(tmp_path):
    unbuilt = keras.Sequential([keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="is not built yet"):
        export_model(unbuilt, tmp_path / "m.onnx")
    quantized = dense_model()
    quantized.quantize("int8")
    for name in ("m.tflite", "m.xml"):
        with pytest.raises(ValueError, match=r"has int8 activations \(dense.* other"):
            export_model(quantized, tmp_path / name)
    assert not os.listdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("format", FILES)
def test_vector_attention_that_chooses_its_method(format, tmp_path):
    inputs = keras.Input((64, 6))
    x = VectorAttention(method="auto", name="attention")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(5)(x[:, 0]))
    randomize_weights(model)
    path = tmp_path / FILES[format]
    small, large = (scale * random_like((3, 64, 6)) for scale in (0.3, 30.0))
    export_model(model, path)
    actual = CLIENTS[format](path, small)["probabilities"]
    expected = softmax(call(model, small))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    # Keras takes another method here; the file cannot, and does not guess.
    assert np.isfinite(call(model, large)).all()
    assert np.isnan(CLIENTS[format](path, large)["probabilities"]).all()
    for method in ("streaming", "dense"):
        export_model(model, path, overwrite=True, vector_attention_method=method)
        for images in (small, large):
            actual = CLIENTS[format](path, images)["probabilities"]
            expected = softmax(call(model, images))
            np.testing.assert_allclose(
                actual, expected, rtol=0, atol=1e-5, err_msg=method
            )


def small_vit():
    return vit(ViTConfig(8, 32, 2, 2, 64), (32, 32, 3), 5, num_tokens=4)


def small_vivit():
    return vivit(
        ViTConfig(8, 32, 2, 2, 64),
        (4, 16, 16, 3),
        tubelet_size=(2, 8, 8),
        num_classes=5,
        num_tokens=2,
        token_fuser=True,
    )


def small_x2plus1d():
    return x2plus1d(
        X2Plus1DConfig(8, (8, 8), (1, 1), 2.25, 32),
        (4, 16, 16, 3),
        num_classes=5,
        num_tokens=2,
        attention="vector",
    )


@pytest.mark.slow
@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize("build", [small_vit, small_vivit, small_x2plus1d])
def test_whole_models(build, format, tmp_path):
    model = build()
    randomize_weights(model, scale=0.1)
    path = tmp_path / FILES[format]
    export_model(model, path, signatures=("serve", "features"))
    assert_clients_agree(model, path, format, with_maps=False)
