import keras
import numpy as np
import pytest

from tests.contract import assert_close, random_like, randomize_weights
from tokenlearner_keras.flops import count_flops
from tokenlearner_keras.layers import GridTokenizer, TokenLearner
from tokenlearner_keras.models import space_time_module

# Tables 4 and 5: parameters, GFLOPs and the printed figures.
ROWS = {
    "joint": (297_216, 22.0, 0.30),
    "conv2d+joint": (1_976_832, 35.8, 1.98),
    "token_learner": (810_368, 3.4, 0.81),
    "conv2d+token_learner": (2_489_984, 17.2, 2.49),
    "conv2d+conv1d": (2_239_488, 18.3, 2.24),
    "conv2d+mlp_mixer": (2_061_056, 13.8, 2.06),
    "conv2d+temporal": (1_976_832, 16.5, 1.98),
    "spatial+temporal": (594_432, 5.5, 0.59),
    "conv2d+spatial+temporal": (2_274_048, 19.2, 2.27),
    "spatial+token_learner": (1_107_584, 6.2, 1.11),
}
SMALL = (4, 3, 3, 16)
# Table 6, in the order of its rows, with the weights at (64, 8, 8, 432).
CONV2D, VECTOR, MHSA = 1_679_616, 559_872, 297_216
TABLE_6 = [
    ({"name": "conv2d+temporal"}, CONV2D + MHSA),
    ({"name": "conv2d+temporal", "attention": "vector"}, CONV2D + VECTOR),
    (
        {"tokenizer": "mean", "attention": "prior", "fuser": "broadcast"},
        CONV2D + 64 * 64 + 432**2,
    ),
    ({"tokenizer": "mean", "fuser": "broadcast"}, CONV2D + VECTOR),
    ({"tokenizer": "mean"}, CONV2D + VECTOR + 64 * 64),
    ({"attention": "multi_head"}, 2_489_984 - VECTOR + MHSA),
    ({}, 2_489_984),
]


@pytest.mark.parametrize("name", ROWS)
def test_parameters_of_tables_4_and_5(name):
    model = space_time_module(name)
    params, _, printed = ROWS[name]
    assert model.count_params() == params
    assert round(params / 1e6, 2) == printed
    assert model.output_shape == (None, 64, 8, 8, 432)


@pytest.mark.tensorflow
@pytest.mark.parametrize("name", ROWS)
def test_gflops_of_tables_4_and_5(name):
    report = count_flops(space_time_module(name), "tf_profiler")
    assert report.uncounted == {}
    assert round(report.total / 1e9, 1) == ROWS[name][1]


@pytest.mark.parametrize(("arguments", "params"), TABLE_6)
def test_table_6(arguments, params):
    arguments = {"name": "conv2d+token_learner", **arguments}
    assert space_time_module(**arguments).count_params() == params
    model = space_time_module(
        input_shape=SMALL, num_tokens=2, num_heads=4, key_dim=2, **arguments
    )
    randomize_weights(model)
    outputs = model.predict(random_like((2, *SMALL)), verbose=0)
    assert outputs.shape == (2, *SMALL)
    assert np.all(np.isfinite(outputs))


@pytest.mark.parametrize("tokenizer", ["token_learner", "grid", "dense", "pooling"])
@pytest.mark.parametrize("fuser", ["token_fuser", "broadcast"])
def test_tokenizers_and_fusers(tokenizer, fuser, tmp_path):
    model = space_time_module(
        "token_learner", SMALL, num_tokens=2, tokenizer=tokenizer, fuser=fuser
    )
    randomize_weights(model)
    x = random_like((2, *SMALL))
    outputs = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(reloaded.predict(x, verbose=0), outputs)
    # One vector a frame is added to all of its pixels.
    added = outputs - x
    assert_close(added, np.broadcast_to(added[:, :, :1, :1], added.shape), 1e-4)


def test_tokenizer_as_a_function():
    model = space_time_module(
        "token_learner",
        SMALL,
        num_tokens=2,
        tokenizer=lambda s: GridTokenizer(s, name="my_grid"),
    )
    assert model.get_layer("my_grid").num_tokens == 2


def test_defaults_of_the_paper():
    model = space_time_module("conv2d+token_learner")
    layer = model.get_layer("token_learner")
    assert layer.get_config() == {
        **TokenLearner.video(8, value_dim=432).get_config(),
        "name": "token_learner",
        "dtype": layer.get_config()["dtype"],
    }
    assert model.get_layer("token_attention").method == "auto"


def test_zero_fuser_is_the_identity():
    model = space_time_module("token_learner", SMALL, num_tokens=2)
    model.get_layer("token_fuser").set_weights([np.zeros((8, 4))])
    x = random_like((2, *SMALL))
    assert_close(model.predict(x, verbose=0), x)


def test_conv2d_conv1d_equals_3d_convolutions():
    model = space_time_module("conv2d+conv1d", SMALL)
    spatial = model.get_layer("conv2d").get_weights()[0][None]
    temporal = model.get_layer("conv1d").get_weights()[0][:, None]
    x = inputs = keras.Input(SMALL)
    x = keras.layers.Conv3D(16, (1, 3, 3), padding="same", use_bias=False)(x)
    x = keras.layers.Conv3D(16, (3, 1, 1), padding="same", use_bias=False)(x)
    twin = keras.Model(inputs, x)
    twin.set_weights([spatial, temporal])
    x = random_like((2, *SMALL))
    assert_close(model.predict(x, verbose=0), twin.predict(x, verbose=0))


@pytest.mark.parametrize(
    "name", ["joint", "conv2d+conv1d", "conv2d+temporal", "spatial+temporal"]
)
def test_any_clip_length(name):
    arguments = {"num_heads": 4, "key_dim": 2}
    anyhow = space_time_module(name, (None, 3, 3, 16), **arguments)
    randomize_weights(anyhow)
    for time in (2, 5):
        fixed = space_time_module(name, (time, 3, 3, 16), **arguments)
        fixed.set_weights(anyhow.get_weights())
        x = random_like((2, time, 3, 3, 16))
        assert_close(anyhow.predict(x, verbose=0), fixed.predict(x, verbose=0))


def test_broadcast_fuser_takes_any_clip_length():
    anyhow = space_time_module(
        "token_learner", (None, 3, 3, 16), num_tokens=2, fuser="broadcast"
    )
    for time in (2, 5):
        x = random_like((2, time, 3, 3, 16))
        assert anyhow.predict(x, verbose=0).shape == x.shape


def test_bad_input():
    with pytest.raises(ValueError, match=r"Expected one of \('joint', .*'conv3d'"):
        space_time_module("conv3d")
    with pytest.raises(ValueError, match=r"num_tokens=65 for 8 x 8 = 64 positions"):
        space_time_module("token_learner", num_tokens=65)
    with pytest.raises(ValueError, match=r"`num_tokens` must be an integer.*=0"):
        space_time_module("token_learner", num_tokens=0)
    with pytest.raises(ValueError, match=r"must fix time: the weights of TokenFuser"):
        space_time_module("token_learner", (None, 8, 8, 432))
    with pytest.raises(ValueError, match=r"must fix time: the weights of MLPMixer"):
        space_time_module("conv2d+mlp_mixer", (None, 8, 8, 432))
    with pytest.raises(ValueError, match=r"must fix time, height, width: .* prior"):
        space_time_module("joint", (4, None, 8, 432), attention="prior")
    with pytest.raises(ValueError, match=r"argument `attention`.*attention='linear'"):
        space_time_module("joint", attention="linear")
    with pytest.raises(ValueError, match=r"argument `tokenizer`.*tokenizer='conv'"):
        space_time_module("token_learner", tokenizer="conv")
    with pytest.raises(ValueError, match=r"argument `fuser`.*fuser=None"):
        space_time_module("token_learner", fuser=None)
    with pytest.raises(ValueError, match=r"must be \(time, height, width, channels\)"):
        space_time_module("joint", (8, 8, 432))
