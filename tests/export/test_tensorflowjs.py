"""TensorFlow.js in Node, and the example page in a real browser."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.contract import randomize_weights
from tokenlearner_keras.export import export_saved_model
from tokenlearner_keras.models import ViTConfig, vit
from tokenlearner_keras.visualization import attention_maps

CLIENTS = Path(__file__).parent / "clients"
NAMES = [f"kind {index}" for index in range(6)]
SIDE = 32

pytestmark = [pytest.mark.slow, pytest.mark.tensorflow]


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    model = vit(ViTConfig(4, 32, 2, 2, 64), (SIDE, SIDE, 3), len(NAMES), num_tokens=4)
    randomize_weights(model, scale=0.2)
    return model


@pytest.fixture(scope="module")
def converted(model, converter_python, tmp_path_factory):
    """The model as TensorFlow.js reads it, with its class names beside it."""
    folder = tmp_path_factory.mktemp("tensorflowjs")
    # Class names make a table in the SavedModel, which the converter cannot read.
    export_saved_model(model, folder / "saved_model", signatures=("explain",))
    command = [converter_python, "-m", "tensorflowjs.converters.converter"]
    options = ["--input_format=tf_saved_model", "--output_format=tfjs_graph_model"]
    signature = "--signature_name=explain"
    subprocess.run(
        [*command, *options, signature, "saved_model", "model"], cwd=folder, check=True
    )
    (folder / "model" / "class_names.txt").write_text("\n".join(NAMES) + "\n")
    return folder / "model"


def assert_close(actual, expected):
    actual = np.asarray(actual, "float32").reshape(expected.shape)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_node(model, converted, browser_example, tmp_path):
    images = np.random.default_rng(0).uniform(-1, 1, (2, SIDE, SIDE, 3))
    images = images.astype("float32")
    (tmp_path / "inputs.json").write_text(
        json.dumps({"shape": images.shape, "values": images.ravel().tolist()})
    )
    client = ("node", CLIENTS / "tfjs_client.mjs", browser_example / "node_modules")
    files = (converted, tmp_path / "inputs.json", tmp_path / "outputs.json")
    subprocess.run([*client, *files], check=True)
    outputs = json.loads((tmp_path / "outputs.json").read_text())
    assert set(outputs) == {"probabilities", "attention_maps"}
    assert outputs["attention_maps"]["shape"] == [2, 4, 8, 8]
    assert_close(
        outputs["probabilities"]["values"], softmax(model.predict(images, verbose=0))
    )
    assert_close(outputs["attention_maps"]["values"], attention_maps(model, images))


@pytest.fixture
def server(converted, browser_example):
    """Address of the example page with the model beside it."""
    shutil.copytree(converted, browser_example / "model", dirs_exist_ok=True)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(browser_example))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("backend", ["cpu", "webgl"])
def test_page_in_chromium(backend, model, server, browser_example, tmp_path):
    from PIL import Image

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "this test needs Chromium: Debian's package `chromium`"
    pixels = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3)).astype("uint8")
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    screenshot = tmp_path / "screenshot.png"
    client = ("node", CLIENTS / "browser_client.mjs", browser_example / "node_modules")
    address = f"{server}?backend={backend}"
    files = (tmp_path / "picture.png", screenshot, tmp_path / "outputs.json")
    subprocess.run([*client, chromium, address, *files], check=True)
    outputs = json.loads((tmp_path / "outputs.json").read_text())
    assert outputs["errors"] == []
    assert outputs["backend"] == backend
    assert outputs["status"].startswith("picture.png: ")

    images = pixels[None].astype("float32") / 127.5 - 1
    expected = softmax(model.predict(images, verbose=0))[0]
    maps = attention_maps(model, images)[0]
    assert_close(outputs["probabilities"], expected)
    assert outputs["mapsShape"] == list(maps.shape)
    assert_close(outputs["maps"], maps)
    order = np.argsort(-expected)[:5]
    assert outputs["classes"] == [[NAMES[i], f"{expected[i]:.4f}"] for i in order]

    # One picture, and over it one map a token: red where the token looks most.
    picture, *drawn = outputs["canvases"]
    assert (picture["width"], picture["height"]) == (280, 280)
    assert len(drawn) == len(maps)
    for canvas, attention in zip(drawn, maps):
        size = (canvas["height"], canvas["width"], 4)
        colours = np.reshape(canvas["pixels"], size).astype(float)
        redness = colours[..., 0] - colours[..., 2]
        cell = canvas["height"] // 8
        cells = redness.reshape(8, cell, 8, cell).mean(axis=(1, 3))
        top, bottom = (
            np.unravel_index(f(attention), (8, 8)) for f in (np.argmax, np.argmin)
        )
        assert cells[top] > cells[bottom] + 50
    with Image.open(screenshot) as image:
        assert image.size[0] == 900
    if folder := os.environ.get("TOKENLEARNER_SCREENSHOTS"):
        shutil.copy(screenshot, Path(folder) / f"browser_{backend}.png")
