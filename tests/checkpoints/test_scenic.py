import warnings

import keras
import numpy as np
import pytest

from tests.contract import assert_close, random_like, randomize_weights, to_numpy
from tokenlearner_keras.checkpoints import load_scenic
from tokenlearner_keras.layers import (
    PatchEmbedding,
    TokenFuser,
    TokenLearner,
    TransformerBlock,
)
from tokenlearner_keras.models import ViTConfig, vit, vivit

CONFIG = ViTConfig(patch_size=4, hidden_dim=32, num_layers=4, num_heads=4, mlp_dim=64)
IMAGE = {"num_classes": 10, "num_tokens": 4, "tokenizer_location": 2}

LAYERS = {
    "scenic_token_learner_v10_sum": lambda: TokenLearner.v10(8),
    "scenic_token_learner_v10_mean_nonsquare": lambda: TokenLearner.v10(
        4, pooling="mean"
    ),
    "scenic_token_learner_v11": lambda: TokenLearner.v11(8, bottleneck_dim=16),
    "scenic_token_learner_v11_nonsquare": lambda: TokenLearner.v11(5),
    "scenic_token_fuser": lambda: TokenFuser(
        "attention", residual=False, bottleneck_dim=16
    ),
    "scenic_token_fuser_no_norm": lambda: TokenFuser(
        "attention", residual=False, use_norm=False
    ),
}
MODELS = {
    "scenic_vit_v10": lambda: vit(CONFIG, (24, 24, 3), token_learner="v10", **IMAGE),
    "scenic_vit_v11": lambda: vit(CONFIG, (24, 24, 3), token_learner="v11", **IMAGE),
    "scenic_vit_v11_fuser": lambda: vit(
        CONFIG, (24, 24, 3), token_learner="v11", token_fuser=True, **IMAGE
    ),
    "scenic_vivit_v11": lambda: vivit(
        CONFIG, (4, 16, 16, 3), (2, 4, 4), token_learner="v11", **IMAGE
    ),
    "scenic_vivit_v11_fuser": lambda: vivit(
        CONFIG,
        (4, 16, 16, 3),
        (2, 4, 4),
        token_learner="v11",
        token_fuser=True,
        **IMAGE,
    ),
}


def relative_error(actual, expected):
    actual = to_numpy(actual)[0].astype("float64")
    return np.abs(actual - expected).max() / np.abs(expected).max()


def call_layer(name, arrays):
    inputs = [arrays[key] for key in sorted(arrays) if key.startswith("inputs/")]
    layer = LAYERS[name]()
    inputs = inputs if len(inputs) > 1 else inputs[0]
    layer(inputs)
    return layer, inputs


def make(name):
    model = MODELS[name]()
    randomize_weights(model)
    return model


@pytest.fixture(autouse=True)
def no_warnings():
    """Nothing is unused or unset unless a test says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weights matched.*")
        yield


@pytest.mark.parametrize("name", LAYERS)
def test_layer_parity(name, load_fixture):
    arrays = load_fixture(name)
    layer, inputs = call_layer(name, arrays)
    randomize_weights(layer)
    report = load_scenic(layer, arrays)
    assert relative_error(layer(inputs), arrays["outputs"]) <= 1e-5
    assert set(report.matched) == {key for key in arrays if key.startswith("params/")}
    assert report.unused == report.unset == ()


@pytest.mark.parametrize("name", MODELS)
def test_model_parity(name, load_fixture):
    arrays = load_fixture(name)
    model = make(name)
    assert relative_error(model(arrays["inputs/0"]), arrays["outputs"]) > 0.1
    report = load_scenic(model, arrays)
    assert relative_error(model(arrays["inputs/0"]), arrays["outputs"]) <= 1e-5
    assert set(report.matched) == {key for key in arrays if key.startswith("params/")}
    assert sorted(report.matched.values()) == sorted(v.path for v in model.weights)
    assert report.unused == report.unset == ()


def test_every_fixture_is_tested(request):
    folder = request.path.parents[1] / "fixtures"
    names = {path.stem for path in folder.glob("scenic_*.npz")}
    assert names == {*LAYERS, *MODELS}


def test_from_a_file(request, load_fixture):
    path = request.path.parents[1] / "fixtures" / "scenic_vit_v10.npz"
    model = make("scenic_vit_v10")
    load_scenic(model, path)
    arrays = load_fixture("scenic_vit_v10")
    assert relative_error(model(arrays["inputs/0"]), arrays["outputs"]) <= 1e-5
    load_scenic(model, str(path))


def test_block_alone(load_fixture):
    arrays = load_fixture("scenic_vit_v11")
    model = make("scenic_vit_v11")
    load_scenic(model, arrays)
    prefix = "params/Transformer/encoderblock_1/"
    part = {
        key.replace(prefix, "params/"): value
        for key, value in arrays.items()
        if key.startswith(prefix)
    }
    block = TransformerBlock(4, 64)
    x = random_like((2, 5, 32))
    block(x)
    load_scenic(block, part)
    assert_close(block(x), model.get_layer("block_1")(x))


def test_unused_and_unset_are_reported(load_fixture):
    arrays = load_fixture("scenic_vit_v11")
    plain = vit(CONFIG, (24, 24, 3), num_classes=10)
    with pytest.warns(UserWarning, match=r"unused: params/Transformer/TokenLearner"):
        report = load_scenic(plain, arrays)
    assert len(report.unused) == 6
    assert all("TokenLearnerModuleV11_0" in name for name in report.unused)
    assert report.unset == ()

    without = {key: a for key, a in arrays.items() if "TokenLearner" not in key}
    model = make("scenic_vit_v11")
    before = [np.array(v) for v in model.get_layer("token_learner").get_weights()]
    with pytest.warns(UserWarning, match=r"unset: token_learner/dense_0/kernel"):
        report = load_scenic(model, without, allow_missing=True)
    assert set(report.unset) == {
        v.path for v in model.get_layer("token_learner").weights
    }
    assert "6 of the model unset" in str(report)
    after = model.get_layer("token_learner").get_weights()
    for a, b in zip(before, after):
        np.testing.assert_array_equal(a, b)


def spoil(arrays, name, how):
    arrays = dict(arrays)
    value = arrays[name].copy()
    if how == "missing":
        del arrays[name]
        return arrays
    if how == "shape":
        value = value[..., :-1]
    elif how == "object":
        value = value.astype(object)
    elif how == "integer":
        value = value.astype("int32")
    else:
        value.reshape(-1)[-1] = float(how)
    arrays[name] = value
    return arrays


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "missing",
            r"1 weight\(s\) that 'vit' needs are missing in the given mapping: ",
        ),
        ("shape", r"must have shape \(32, 4, 8\).*Received: shape \(32, 4, 7\)"),
        ("nan", r"not finite \(NaN or infinite\)"),
        ("inf", r"not finite \(NaN or infinite\)"),
        ("object", "must be an array of floats. Received: dtype=object"),
        ("integer", "must be an array of floats. Received: dtype=int32"),
    ],
)
def test_a_bad_weight_is_named_and_nothing_is_loaded(how, message, load_fixture):
    name = "params/Transformer/encoderblock_3/MultiHeadDotProductAttention_0/key/kernel"
    model = make("scenic_vit_v11")
    before = model.get_weights()
    with pytest.raises(ValueError, match=message) as error:
        load_scenic(model, spoil(load_fixture("scenic_vit_v11"), name, how))
    assert name in str(error.value)
    for a, b in zip(before, model.get_weights()):
        np.testing.assert_array_equal(a, b)


def test_pickles_are_refused(tmp_path, load_fixture):
    arrays = load_fixture("scenic_token_learner_v11")
    name = "params/token_masking/Dense_1/kernel"
    layer, _ = call_layer("scenic_token_learner_v11", arrays)
    path = tmp_path / "objects.npz"
    np.savez(path, **spoil(arrays, name, "object"))
    with pytest.raises(ValueError, match=f"Weight '{name}' of .*never unpickled"):
        load_scenic(layer, path)


def test_other_models_and_layers():
    with pytest.raises(
        ValueError, match=r"`model_or_layer` must be .* Received: <Patch"
    ):
        load_scenic(PatchEmbedding(4), {})
    with pytest.raises(ValueError, match=r"has no weights yet"):
        load_scenic(TokenLearner.v11(4), {})
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="only")])
    with pytest.raises(ValueError, match=r"must be built by .*vit.*\['only'\]"):
        load_scenic(model, {})
    fuser = TokenFuser()
    fuser([random_like((1, 4, 8)), random_like((1, 3, 3, 8))])
    with pytest.raises(ValueError, match=r"must have mode='attention'"):
        load_scenic(fuser, {})
