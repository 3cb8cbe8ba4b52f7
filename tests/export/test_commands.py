import json
import subprocess
import sys

import keras
import numpy as np
import pytest

from tests.contract import randomize_weights
from tokenlearner_keras.cli import main
from tokenlearner_keras.data import preprocess_images
from tokenlearner_keras.layers import TokenLearner

pytestmark = pytest.mark.tensorflow
NAMES = ("ant", "bee", "cat")


def make_model(rank=4):
    inputs = keras.Input((8, 8, 3) if rank == 4 else (4, 8, 8, 3))
    kernel = (2, 2) if rank == 4 else (1, 2, 2)
    conv = keras.layers.Conv2D if rank == 4 else keras.layers.Conv3D
    x = conv(6, kernel, strides=kernel)(inputs)
    x = keras.layers.GlobalAveragePooling1D()(TokenLearner.video(4)(x))
    model = keras.Model(inputs, keras.layers.Dense(3)(x))
    randomize_weights(model)
    return model


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3)).astype("uint8")
    Image.fromarray(pixels).save("picture.png")
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    return tmp_path, pixels


def test_a_saved_model_from_the_command_line(folder, capsys):
    _, pixels = folder
    model = make_model()
    model.save("model.keras")
    export = ["export", "model.keras", "model", "--preprocessing", "jpeg_bytes"]
    assert main([*export, "--class-names", "names.txt"]) == 0
    assert "model (saved_model)" in capsys.readouterr().out

    assert main(["inspect", "model", "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert description["format"] == "saved_model"
    assert description["class_names"] == list(NAMES)
    assert description["num_bytes"] > 1000
    assert description["versions"]["written by TensorFlow"].startswith("2.")
    assert set(description["signatures"]) == {
        "serve",
        "features",
        "attention_maps",
        "serving_default",
    }
    assert description["signatures"]["serve"] == {
        "inputs": {"image_bytes": [[None], "string"]},
        "outputs": {"probabilities": [[None, 3], "float32"]},
    }
    assert main(["inspect", "model"]) == 0
    text = capsys.readouterr().out
    assert "signature attention_maps" in text
    assert "output attention_maps: float32 (any, 4, 4, 4)" in text

    # A file that is no picture is reported, and the others still run.
    assert main(["predict", "model", "picture.png", "broken.jpg", "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    expected = softmax(
        model.predict(preprocess_images(pixels, (8, 8))[None], verbose=0)
    )[0]
    order = np.argsort(-expected)
    assert [entry["name"] for entry in first["classes"]] == [NAMES[i] for i in order]
    actual = [entry["probability"] for entry in first["classes"]]
    np.testing.assert_allclose(actual, expected[order], atol=1e-5)
    assert second["file"] == "broken.jpg"
    assert "refuses its input" in second["error"]

    assert main(["predict", "model", "picture.png", "--top", "1"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["file", "class", "probability"]
    assert row.split() == ["picture.png", NAMES[order[0]], f"{expected.max():.4f}"]


def write_clip(av):
    frames = np.zeros((12, 32, 32, 3), "uint8")
    frames[:, :16, :, 0] = np.linspace(0, 255, 12)[:, None, None]
    with av.open("clip.mp4", "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for frame in frames:
            packet = stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))
            container.mux(packet)
        container.mux(stream.encode())


def expected_of_clip(model):
    from tokenlearner_keras.data import read_video

    decoded = read_video("clip.mp4").frames
    indices = np.linspace(0, len(decoded) - 1, 4).round().astype(int)
    clip = preprocess_images(decoded[indices], (8, 8))
    return softmax(model.predict(np.asarray(clip)[None], verbose=0))[0]


def test_a_saved_model_of_clips_from_the_command_line(folder, capsys):
    write_clip(pytest.importorskip("av"))
    model = make_model(rank=5)
    model.save("model.keras")
    export = ["export", "model.keras", "model", "--preprocessing", "uint8"]
    assert main([*export, "--class-names", "names.txt"]) == 0
    capsys.readouterr()
    assert main(["inspect", "model"]) == 0
    text = capsys.readouterr().out
    assert "input  images: uint8 (any, 4, any, any, 3)" in text
    assert "output attention_maps: float32 (any, 4, 4, 4, 4)" in text
    assert main(["predict", "model", "clip.mp4"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["file", "class", "probability"]
    expected = expected_of_clip(model)
    assert [row.split()[:2] for row in rows] == [
        ["clip.mp4", NAMES[index]] for index in np.argsort(-expected)
    ]
    actual = [float(row.split()[2]) for row in rows]
    np.testing.assert_allclose(actual, np.sort(expected)[::-1], atol=6e-5)
    # A picture is no clip, and what is no video is named.
    (folder[0] / "broken.mp4").write_bytes(b"no video")
    assert main(["predict", "model", "picture.png", "broken.mp4", "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert "is an image, and the model takes clips" in first["error"]
    assert "broken.mp4" in second["error"]


def test_onnx_and_video_from_the_command_line(folder, capsys):
    av = pytest.importorskip("av")
    model = make_model(rank=5)
    model.save("model.keras")
    write_clip(av)
    assert main(["export", "model.keras", "model.onnx", "--batch-size", "1"]) == 0
    assert "(onnx, weights: as trained)" in capsys.readouterr().out
    assert main(["inspect", "model.onnx", "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert description["signatures"]["serving_default"]["inputs"] == {
        "images": [[1, 4, 8, 8, 3], "float32"]
    }
    assert description["versions"]["opset"] >= 13
    assert main(["predict", "model.onnx", "clip.mp4", "picture.png", "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert "is an image, and the model takes clips" in second["error"]

    expected = expected_of_clip(model)
    actual = {e["class"]: e["probability"] for e in first["classes"]}
    np.testing.assert_allclose([actual[i] for i in range(3)], expected, atol=1e-5)
    assert first["classes"][0]["name"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "none.keras", "out"], "no model file at none.keras"),
        (["inspect", "none"], "no exported model at none"),
        (["predict", "none.onnx", "picture.png"], "no exported model at none.onnx"),
    ],
)
def test_bad_input(arguments, message, folder, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_python_m(folder):
    result = subprocess.run(
        [sys.executable, "-m", "tokenlearner_keras", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for command in ("export", "inspect", "predict"):
        assert command in result.stdout
