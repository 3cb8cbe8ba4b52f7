import io
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from tests.contract import random_like, randomize_weights
from tokenlearner_keras.data import preprocess_images
from tokenlearner_keras.export import export_saved_model, load_exported
from tokenlearner_keras.layers import TokenLearner
from tokenlearner_keras.visualization import attention_maps

pytestmark = pytest.mark.tensorflow

# Whatever imports Keras or this package fails.
BLOCK = "import sys; sys.modules['keras'] = sys.modules['tokenlearner_keras'] = None; "


def image_model(activation=None, num_token_learners=1, dtype=None):
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(6, 2, strides=2, dtype=dtype)(inputs)
    x = TokenLearner.v1(4, name="first", dtype=dtype)(x)
    if num_token_learners == 2:
        x = TokenLearner.v11(2, grid_shape=(2, 2), name="second", dtype=dtype)(x)
    x = keras.layers.GlobalAveragePooling1D(name="pool", dtype=dtype)(x)
    outputs = keras.layers.Dense(3, activation=activation, name="head", dtype=dtype)(x)
    model = keras.Model(inputs, outputs, name="small")
    randomize_weights(model)
    return model


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def encode(image, image_format="PNG"):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=image_format)
    return buffer.getvalue()


def assert_close(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected)


def load(path):
    import tensorflow as tf

    return tf.saved_model.load(str(path))


def call(path, signature, images):
    restored = load(path)  # Its variables live as long as it does.
    return getattr(restored, signature)(images)


def expected_outputs(model, images):
    pool = keras.Model(model.inputs, model.get_layer("pool").output)
    return {
        "serve": {"probabilities": softmax(model.predict(images, verbose=0))},
        "features": {"features": pool.predict(images, verbose=0)},
        "attention_maps": {"attention_maps": attention_maps(model, images)},
    }


def test_all_signatures_and_any_batch(tmp_path):
    model = image_model()
    path = export_saved_model(model, tmp_path / "deep" / "saved_model")
    assert path == tmp_path / "deep" / "saved_model"
    # Nothing is left beside it.
    assert os.listdir(tmp_path / "deep") == ["saved_model"]
    restored = load(path)
    assert set(restored.signatures) == {
        "serve",
        "features",
        "attention_maps",
        "serving_default",
    }
    for batch in (1, 5):
        images = random_like((batch, 8, 8, 3))
        for signature, outputs in expected_outputs(model, images).items():
            for function in (
                getattr(restored, signature),
                restored.signatures[signature],
            ):
                actual = function(images=images)
                assert set(actual) == set(outputs)
                for name, value in outputs.items():
                    assert_close(actual[name], value)
    default = restored.signatures["serving_default"](images=images)
    assert_close(default["probabilities"].numpy().sum(axis=1), np.ones(5))


def test_a_process_without_keras_and_this_package(tmp_path):
    model = image_model()
    export_saved_model(model, tmp_path / "saved_model")
    images = random_like((3, 8, 8, 3))
    np.save(tmp_path / "images.npy", images)
    script = BLOCK + (
        "import numpy as np, tensorflow as tf; "
        "restored = tf.saved_model.load('saved_model'); "
        "images = np.load('images.npy'); "
        "names = ('serve', 'features', 'attention_maps'); "
        "outputs = [f(images=images) for f in map(restored.signatures.get, names)]; "
        "np.savez('outputs.npz', **{k: v for o in outputs for k, v in o.items()}); "
        "assert not any(n.split('.')[0] in ('keras', 'tokenlearner_keras') and m "
        "for n, m in sys.modules.items())"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    with np.load(tmp_path / "outputs.npz") as actual:
        for outputs in expected_outputs(model, images).values():
            for name, value in outputs.items():
                assert_close(actual[name], value)


def test_saved_model_cli(tmp_path):
    model = image_model()
    export_saved_model(model, tmp_path / "saved_model")
    images = random_like((3, 8, 8, 3))
    np.save(tmp_path / "images.npy", images)
    script = BLOCK + (
        "from tensorflow.python.tools import saved_model_cli; saved_model_cli.main()"
    )
    arguments = (
        "run --dir saved_model --tag_set serve --signature_def serve "
        "--inputs images=images.npy --outdir out"
    )
    subprocess.run(
        [sys.executable, "-c", script, *arguments.split()], cwd=tmp_path, check=True
    )
    actual = np.load(tmp_path / "out" / "probabilities.npy")
    assert_close(actual, softmax(model.predict(images, verbose=0)))


def test_tfsm_layer(tmp_path):
    model = image_model()
    path = export_saved_model(model, tmp_path / "saved_model")
    images = random_like((2, 8, 8, 3))
    layer = keras.layers.TFSMLayer(str(path), call_endpoint="serve")
    assert_close(
        layer(images)["probabilities"], softmax(model.predict(images, verbose=0))
    )


@pytest.mark.parametrize(
    ("activation", "output_activation"),
    [
        ("softmax", "auto"),
        ("sigmoid", "auto"),
        ("sigmoid", None),
        (None, "softmax"),
        (None, "sigmoid"),
    ],
)
def test_probabilities(activation, output_activation, tmp_path):
    model = image_model(activation)
    path = export_saved_model(
        model, tmp_path / "model", ["serve"], output_activation=output_activation
    )
    images = random_like((4, 8, 8, 3))
    expected = model.predict(images, verbose=0)
    if activation is None:
        function = (
            softmax
            if output_activation == "softmax"
            else lambda x: 1 / (1 + np.exp(-x))
        )
        expected = function(expected)
    assert_close(call(path, "serve", images)["probabilities"], expected)


def test_softmax_as_a_layer_of_its_own(tmp_path):
    model = image_model()
    wrapped = keras.Model(model.inputs, keras.layers.Softmax()(model.outputs[0]))
    path = export_saved_model(wrapped, tmp_path / "model")
    images = random_like((4, 8, 8, 3))
    restored = load(path)
    assert_close(
        restored.serve(images)["probabilities"], wrapped.predict(images, verbose=0)
    )
    features = expected_outputs(model, images)["features"]["features"]
    assert_close(restored.features(images)["features"], features)


def test_several_token_learners(tmp_path):
    model = image_model(num_token_learners=2)
    path = export_saved_model(model, tmp_path / "model", "attention_maps")
    images = random_like((2, 8, 8, 3))
    actual = call(path, "attention_maps", images)
    assert set(actual) == {"attention_maps", "attention_maps_1"}
    assert_close(actual["attention_maps"], attention_maps(model, images, "first"))
    assert_close(actual["attention_maps_1"], attention_maps(model, images, "second"))


def test_feature_layer(tmp_path):
    model = image_model()
    path = export_saved_model(
        model, tmp_path / "model", ["features"], feature_layer="first"
    )
    images = random_like((2, 8, 8, 3))
    expected = keras.Model(model.inputs, model.get_layer("first").output)(images)
    assert_close(call(path, "features", images)["features"], expected)
    # A model without a head: its output is its features.
    headless = keras.Model(model.inputs, model.get_layer("pool").output)
    path = export_saved_model(headless, tmp_path / "headless", ["features"])
    assert_close(call(path, "features", images)["features"], headless(images))


def test_half_precision_models_give_float32(tmp_path):
    model = image_model(dtype="mixed_bfloat16")
    restored = load(export_saved_model(model, tmp_path / "model"))
    images = random_like((2, 8, 8, 3))
    probabilities = restored.serve(images)["probabilities"]
    assert probabilities.dtype == "float32"
    assert_close(probabilities.numpy().sum(axis=1), np.ones(2))
    assert restored.attention_maps(images)["attention_maps"].dtype == "float32"
    assert restored.features(images)["features"].dtype == "float32"


def test_class_names_are_an_asset(tmp_path):
    names = ["T-shirt/top", "Räuber", "bag"]
    path = export_saved_model(image_model(), tmp_path / "model", class_names=names)
    moved = tmp_path / "elsewhere"
    path.rename(moved)
    text = (moved / "assets" / "class_names.txt").read_text(encoding="utf-8")
    assert text.splitlines() == names
    call(moved, "serve", random_like((1, 8, 8, 3)))


def test_uint8_preprocessing(tmp_path):
    model = image_model()
    path = export_saved_model(
        model, tmp_path / "model", preprocessing="uint8", value_range=(0, 1)
    )
    restored = load(path)
    rng = np.random.default_rng(0)
    for size in ((8, 8), (31, 17)):
        images = rng.integers(0, 256, (2, *size, 3), dtype="uint8")
        prepared = preprocess_images(images, (8, 8), (0, 1)).numpy()
        for signature, outputs in expected_outputs(model, prepared).items():
            actual = restored.signatures[signature](images=images)
            for name, value in outputs.items():
                assert_close(actual[name], value)


def test_uint8_preprocessing_of_clips(tmp_path):
    inputs = keras.Input((3, 8, 8, 3))
    x = TokenLearner.video(2)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(x[:, 0]))
    path = export_saved_model(model, tmp_path / "model", preprocessing="uint8")
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 12, 20, 3), dtype="uint8")
    frames = preprocess_images(clips.reshape(6, 12, 20, 3), (8, 8)).numpy()
    prepared = frames.reshape(2, 3, 8, 8, 3)
    actual = call(path, "serve", clips)["probabilities"]
    assert_close(actual, softmax(model.predict(prepared, verbose=0)))


def test_jpeg_bytes_preprocessing(tmp_path):
    import tensorflow as tf

    model = image_model()
    path = export_saved_model(model, tmp_path / "model", preprocessing="jpeg_bytes")
    restored = load(path)
    serve = restored.signatures["serve"]
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, (*size, 3), dtype="uint8") for size in ((8, 8), (30, 20))
    ]
    encoded = [encode(images[0], "PNG"), encode(images[1], "JPEG")]
    # JPEG loses a little, so what TensorFlow decodes from it is the reference.
    images[1] = tf.io.decode_jpeg(encoded[1]).numpy()
    prepared = np.stack([preprocess_images(x, (8, 8)).numpy() for x in images])
    expected = softmax(model.predict(prepared, verbose=0))
    actual = serve(image_bytes=tf.constant(encoded))["probabilities"]
    assert_close(actual, expected)
    # A broken image fails its own request and no other.
    with pytest.raises(tf.errors.InvalidArgumentError, match="image"):
        serve(image_bytes=tf.constant([encoded[0], b"\xff\xd8 not a JPEG"]))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?i)jpeg"):
        serve(image_bytes=tf.constant([encoded[1][: len(encoded[1]) // 2]]))
    assert_close(serve(image_bytes=tf.constant(encoded))["probabilities"], expected)


def test_refuses_to_overwrite(tmp_path):
    model, other = image_model(), image_model("softmax")
    path = tmp_path / "model"
    export_saved_model(model, path)
    before = sorted((p, p.stat().st_mtime_ns) for p in path.rglob("*"))
    with pytest.raises(
        ValueError, match=r"model exists already. Pass `overwrite=True`"
    ):
        export_saved_model(other, path)
    assert sorted((p, p.stat().st_mtime_ns) for p in path.rglob("*")) == before
    export_saved_model(other, path, overwrite=True)
    images = random_like((2, 8, 8, 3))
    assert_close(call(path, "serve", images)["probabilities"], other(images))
    assert os.listdir(tmp_path) == ["model"]
    # Never a folder that is something else.
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="is not a SavedModel, so it is not replaced"):
        export_saved_model(model, tmp_path / "photos", overwrite=True)


def test_a_failed_export_leaves_the_old_model(tmp_path, monkeypatch):
    path = export_saved_model(image_model(), tmp_path / "model")

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("tensorflow.saved_model.save", fail)
    with pytest.raises(OSError, match="no space left"):
        export_saved_model(image_model(), path, overwrite=True)
    assert os.listdir(tmp_path) == ["model"]
    call(path, "serve", random_like((1, 8, 8, 3)))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"cannot be written: .*file is not writable"):
        export_saved_model(image_model(), tmp_path / "file" / "model")


def test_models_that_cannot_be_exported(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(ValueError, match="is not built yet"):
        export_saved_model(keras.Sequential([keras.layers.Dense(2)]), path)
    with pytest.raises(ValueError, match=r"must be a `keras\.Model`"):
        export_saved_model(keras.layers.Dense(2), path)

    class Subclassed(keras.Model):
        def call(self, x):
            return x

    model = Subclassed()
    model(random_like((1, 4)))
    with pytest.raises(ValueError, match=r"must be functional.*of type Subclassed"):
        export_saved_model(model, path)
    a, b = keras.Input((2,)), keras.Input((2,))
    with pytest.raises(ValueError, match="2 inputs and 1 outputs"):
        export_saved_model(keras.Model([a, b], a + b), path)
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name="plain")
    with pytest.raises(ValueError, match=r"'plain' has no `TokenLearner`.*'features'"):
        export_saved_model(plain, path)
    export_saved_model(plain, path, ("serve", "features"))
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"signatures": ["predict"]}, r"`signatures` must list.*\('predict',\)"),
        ({"signatures": []}, "`signatures` must list some of"),
        ({"signatures": ["serve", "serve"]}, "each once"),
        ({"preprocessing": "float"}, "argument `preprocessing`"),
        ({"output_activation": "relu"}, "argument `output_activation`"),
        ({"feature_layer": "neck"}, r"`feature_layer` must name.*feature_layer='neck'"),
        (
            {"class_names": ["a", "b"]},
            r"each output of the model, 3. Received: 2 names",
        ),
        ({"class_names": ["a", "b", "c\nd"]}, "must not contain line breaks"),
    ],
)
def test_invalid_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_saved_model(image_model(), tmp_path / "model", **arguments)
    assert os.listdir(tmp_path) == []


def test_preprocessing_that_the_model_cannot_have(tmp_path):
    inputs = keras.Input((None, None, 3))
    x = keras.layers.GlobalAveragePooling2D()(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    for preprocessing in ("uint8", "jpeg_bytes"):
        with pytest.raises(ValueError, match=r"fixed height, width.*None, None, 3\)"):
            export_saved_model(model, tmp_path / "m", ["serve"], preprocessing)
    inputs = keras.Input((2, 8, 8, 3))
    model = keras.Model(inputs, keras.layers.Flatten()(inputs))
    with pytest.raises(ValueError, match=r"'jpeg_bytes'` needs .* rank 4"):
        export_saved_model(model, tmp_path / "m", ["serve"], "jpeg_bytes")
    inputs = keras.Input((8, 8, 2))
    model = keras.Model(inputs, keras.layers.Flatten()(inputs))
    with pytest.raises(ValueError, match="images of 1, 3 or 4 channels"):
        export_saved_model(model, tmp_path / "m", ["serve"], "jpeg_bytes")


def test_flexible_image_size(tmp_path):
    # What the model leaves open, the SavedModel leaves open.
    inputs = keras.Input((None, None, 3))
    x = TokenLearner.v1(2)(keras.layers.Conv2D(4, 2, strides=2)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2)(x[:, 0]))
    restored = load(export_saved_model(model, tmp_path / "model"))
    for size in ((8, 8), (6, 10)):
        images = random_like((2, *size, 3))
        actual = restored.serve(images)["probabilities"]
        assert_close(actual, softmax(model.predict(images, verbose=0)))


def test_flexible_clip_length(tmp_path):
    inputs = keras.Input((None, 8, 8, 3))
    x = keras.layers.Conv3D(6, (1, 2, 2), strides=(1, 2, 2))(inputs)
    x = TokenLearner.video(4, name="tokens")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    randomize_weights(model)
    restored = load(export_saved_model(model, tmp_path / "model"))
    for frames in (2, 5):
        clips = random_like((2, frames, 8, 8, 3))
        assert_close(
            restored.signatures["serve"](images=clips)["probabilities"],
            softmax(model.predict(clips, verbose=0)),
        )
        maps = restored.signatures["attention_maps"](images=clips)["attention_maps"]
        assert maps.shape == (2, frames, 4, 4, 4)
        assert_close(maps, attention_maps(model, clips))


def test_explain_gives_probabilities_and_maps(tmp_path):
    model = image_model(num_token_learners=2)
    images = random_like((2, 8, 8, 3))
    restored = load(export_saved_model(model, tmp_path / "model", ("explain",)))
    outputs = restored.signatures["serving_default"](images=images)
    assert set(outputs) == {"probabilities", "attention_maps", "attention_maps_1"}
    assert_close(outputs["probabilities"], softmax(model.predict(images, verbose=0)))
    assert_close(outputs["attention_maps"], attention_maps(model, images))


def test_train_signature(tmp_path):
    import tensorflow as tf

    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(6, 2, strides=2)(inputs)
    x = TokenLearner.v1(4)(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.5)(keras.layers.Flatten()(x))
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    randomize_weights(model)
    images = tf.constant(random_like((8, 8, 8, 3)))
    labels = tf.constant([0, 1, 2, 0, 1, 2, 0, 1])
    restored = load(export_saved_model(model, tmp_path / "model", ("serve", "train")))
    variables = restored.trainable_variables
    assert [tuple(v.shape) for v in variables] == [
        tuple(v.shape) for v in model.trainable_variables
    ]
    # Dropout is active: two passes differ. And so are batch statistics.
    first, second = (restored.train(images)["outputs"] for _ in range(2))
    assert np.abs(first - second).max() > 0.01
    moving = restored.non_trainable_variables
    changed = [
        np.any(v.numpy() != np.array(w))
        for v, w in zip(moving, model.non_trainable_variables)
    ]
    assert all(changed[:2])

    def loss_fn():
        logits = restored.train(images)["outputs"]
        return tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        )

    before = restored.serve(images)["probabilities"].numpy()
    losses = []
    for _ in range(30):
        with tf.GradientTape() as tape:
            loss = loss_fn()
        for variable, gradient in zip(variables, tape.gradient(loss, variables)):
            variable.assign_sub(0.3 * gradient)
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    # All signatures share the weights.
    after = restored.serve(images)["probabilities"].numpy()
    assert np.mean(after.argmax(-1) == labels) > np.mean(before.argmax(-1) == labels)


def test_weights_are_written_once(tmp_path):
    inputs = keras.Input((16, 16, 3))
    x = keras.layers.Dense(256, "relu")(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    signatures = ("serve", "features", "train")
    path = export_saved_model(model, tmp_path / "model", signatures)
    num_bytes = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert num_bytes < 1.2 * 4 * model.count_params()
    restored = load(path)
    assert len(restored.variables) == len(restored.trainable_variables) == 4
    images = random_like((2, 16, 16, 3))
    for variable in restored.trainable_variables:
        variable.assign(0.5 * variable)
    for variable, half in zip(model.weights, restored.variables):
        np.testing.assert_array_equal(0.5 * np.array(variable), half.numpy())
        variable.assign(half.numpy())
    # Those are the variables that the signatures read.
    assert_close(
        restored.serve(images)["probabilities"],
        softmax(model.predict(images, verbose=0)),
    )


def test_wrong_inputs_name_the_input_and_both_shapes(tmp_path):
    import tensorflow as tf

    restored = load(export_saved_model(image_model(), tmp_path / "model"))
    serve = restored.signatures["serve"]
    with pytest.raises(Exception, match="images") as shape_error:
        serve(images=random_like((2, 9, 8, 3)))
    for shape in ("(2, 9, 8, 3)", "(None, 8, 8, 3)"):
        assert shape in str(shape_error.value)
    # A signature's own message names the tensor by its number; what it was raised from
    # names it and both shapes and dtypes.
    for function in (serve, restored.serve):
        with pytest.raises((TypeError, tf.errors.InvalidArgumentError)) as dtype_error:
            function(images=tf.zeros((2, 8, 8, 3), "int32"))
        text, error = "", dtype_error.value
        while error is not None:
            text, error = f"{text}\n{error}", error.__cause__ or error.__context__
        for part in ("'images'", "float32", "int32", "(2, 8, 8, 3)", "(None, 8, 8, 3)"):
            assert part in text
    with pytest.raises(ValueError, match=r"Input 'images' of .* must be float32") as e:
        load_exported(tmp_path / "model")(np.zeros((2, 8, 8, 3), "int32"))
    assert "of shape (None, 8, 8, 3)" in str(e.value)
    assert "int32 of shape (2, 8, 8, 3)" in str(e.value)
