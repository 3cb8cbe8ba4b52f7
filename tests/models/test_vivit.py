import keras
import numpy as np
import pytest
from keras import ops

from tests.contract import assert_close, random_like, randomize_weights
from tokenlearner_keras.layers import TokenLearner
from tokenlearner_keras.models import ViTConfig, vit, vivit

# The patch size is ignored: 5 divides nothing here.
CONFIG = ViTConfig(patch_size=5, hidden_dim=16, num_layers=3, num_heads=2, mlp_dim=24)
SHAPE = (4, 8, 12, 3)
TUBELET = (2, 4, 4)  # A grid of 2 x 2 x 3.

BUILDERS = {
    "plain": {},
    "v1": {"num_tokens": 2},
    "class_token": {"num_tokens": 2, "classifier": "token", "tokenizer_location": 2},
    "fuser": {"num_tokens": 2, "token_fuser": True, "token_learner": "v11"},
    "fuser_token": {
        "num_tokens": 2,
        "token_fuser": True,
        "classifier": "token",
        "token_learner": "v10",
        "tokenizer_location": 0,
    },
}


def build(seed=0, **arguments):
    arguments = {"input_shape": SHAPE, "tubelet_size": TUBELET, **arguments}
    model = vivit(CONFIG, **{"num_classes": 5, **arguments})
    randomize_weights(model, seed)
    return model


@pytest.mark.parametrize("name", BUILDERS)
def test_round_trip(name, tmp_path):
    model = build(**BUILDERS[name])
    x = random_like((2, *SHAPE))
    model.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(reloaded(x), model(x))
    assert_close(reloaded(x[:1]), ops.convert_to_numpy(model(x))[:1], 1e-4)


@pytest.mark.tensorflow
@pytest.mark.parametrize("name", ["class_token", "fuser_token"])
def test_xla_equals_eager(name):
    import tensorflow as tf

    model = build(**BUILDERS[name])
    x = random_like((2, *SHAPE))
    assert_close(tf.function(model, jit_compile=True)(x), model(x))


@pytest.mark.parametrize("location", [0, 1, 2])
def test_tokens_are_learned_frame_by_frame(location):
    """The tokens of a frame are those of the same grid as a single image."""
    model = build(num_tokens=2, tokenizer_location=location)
    x = random_like((2, *SHAPE))
    grid = keras.Model(model.input, model.get_layer("grid").output)(x)
    assert grid.shape == (2, 2, 2, 3, 16)
    layer = model.get_layer("token_learner")
    tokens = keras.Model(model.input, layer.output)(x)
    assert tokens.shape == (2, 4, 16)
    frames = [layer(grid[:, time]) for time in range(2)]
    assert_close(tokens, ops.concatenate(frames, axis=1))
    for index in range(3):
        positions = model.get_layer(f"block_{index}").output.shape[1]
        assert positions == (12 if index < location else 4)


def test_fusers_restore_every_position():
    model = build(**BUILDERS["fuser"])
    assert model.get_layer("token_fuser_2").output.shape == (None, 2, 2, 3, 16)
    assert model.get_layer("encoder_norm").output.shape == (None, 12, 16)
    names = [layer.name for layer in model.layers if "token_" in layer.name]
    assert names == [
        "token_learner_1",
        "token_fuser_1",
        "token_learner_2",
        "token_fuser_2",
    ]


def test_one_frame_is_vit():
    """With tubelets of one frame a video of one frame is an image."""
    arguments = {"num_classes": 5, "num_tokens": 2, "token_learner": "v11"}
    image = vit(ViTConfig(4, 16, 3, 2, 24), (8, 12, 3), **arguments)
    video = vivit(CONFIG, (1, 8, 12, 3), (1, 4, 4), **arguments)
    randomize_weights(image)
    weights = image.get_weights()
    video.set_weights(
        [np.reshape(w, v.shape) for w, v in zip(weights, video.get_weights())]
    )
    x = random_like((2, 8, 12, 3))
    assert_close(video(x[:, None]), image(x))


def test_parameters_of_a_published_size(monkeypatch):
    for name in ("GlorotUniform", "LecunNormal", "RandomNormal"):
        monkeypatch.setattr(
            getattr(keras.initializers, name),
            "__call__",
            lambda self, shape, dtype=None: ops.zeros(shape, dtype or "float32"),
        )
    model = vivit("S/16", num_classes=400, num_tokens=8)
    dim, mlp, positions = 384, 1536, 16 * 14 * 14
    block = 4 * (dim * dim + dim) + 2 * dim * mlp + mlp + dim + 4 * dim
    expected = (
        (2 * 16 * 16 * 3 + 1) * dim  # tubelets
        + positions * dim
        + 12 * block
        + 9 * (dim * 8 + 2 * 8 * 8)  # TokenLearner
        + 2 * dim
        + (dim + 1) * 400
    )
    assert model.count_params() == expected
    assert model.name == "vivit_s_16"
    assert model.get_layer("block_6").output.shape == (None, 16 * 8, dim)


@pytest.mark.slow
def test_a_train_step_and_mixed_precision():
    reference = build(**BUILDERS["fuser"])
    model = vivit(
        CONFIG, SHAPE, TUBELET, 5, dtype="mixed_bfloat16", **BUILDERS["fuser"]
    )
    model.set_weights(reference.get_weights())
    x = random_like((4, *SHAPE))
    assert model.get_layer("head").compute_dtype == "float32"
    assert_close(model(x), reference(x), 0.05)
    model.compile(
        optimizer="adam",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    assert np.isfinite(model.train_on_batch(x, np.arange(4)))


def test_token_learner_function():
    model = build(
        num_tokens=2, token_learner=lambda n: TokenLearner.video(n, value_dim=16)
    )
    assert model.get_layer("token_learner").value_dim == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"input_shape": (3, 8, 12, 3)},
            r"`tubelet_size` of layer 'tubelet_embedding' must divide .*\(3, 8, 12\)",
        ),
        ({"input_shape": (8, 12, 3)}, r"`input_shape` must be .*\(time, height, width"),
        ({"tubelet_size": (2, 4)}, "`tubelet_size` must be an integer or 3 integers"),
        ({"tubelet_size": (0, 4, 4)}, r"`tubelet_size\[0\]` must be an integer"),
        ({"num_tokens": 7}, r"must be at most the number of positions.*for 2 x 3 = 6"),
        ({"num_tokens": 0}, r"`num_tokens` must be an integer of at least 1"),
        ({"tokenizer_location": 3}, r"`tokenizer_location` must be .* 3 blocks"),
        ({"num_tokens": None, "token_fuser": True}, "needs `num_tokens`"),
        ({"classifier": "mean"}, r"`classifier`. Expected one of"),
        ({"variant": "S/8"}, r"`variant`. Expected one of"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        vivit(
            **{
                "variant": CONFIG,
                "input_shape": SHAPE,
                "tubelet_size": TUBELET,
                "num_tokens": 2,
                **arguments,
            }
        )
