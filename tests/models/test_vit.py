import keras
import numpy as np
import pytest
from keras import ops

from tests.contract import (
    assert_close,
    gradients,
    random_like,
    randomize_weights,
    to_numpy,
)
from tokenlearner_keras.layers import TokenFuser, TokenLearner
from tokenlearner_keras.models import ViTConfig, vit
from tokenlearner_keras.models.vit_config import VARIANTS

CONFIG = ViTConfig(patch_size=4, hidden_dim=16, num_layers=4, num_heads=2, mlp_dim=24)
SHAPE = (16, 24, 3)  # 4 x 6 patches.

BUILDERS = {
    "plain": {},
    "plain_token": {"classifier": "token"},
    "features": {"classifier": None, "num_tokens": 3},
    "v1": {"num_tokens": 3},
    "v10": {"num_tokens": 3, "token_learner": "v10", "tokenizer_location": 1},
    "v11": {"num_tokens": 3, "token_learner": "v11", "tokenizer_location": 0.0},
    "class_token": {"num_tokens": 3, "classifier": "token", "tokenizer_location": 3},
    "fuser": {"num_tokens": 3, "token_fuser": True, "token_learner": "v11"},
    "fuser_token": {"num_tokens": 3, "token_fuser": True, "classifier": "token"},
    "pre_logits": {"num_tokens": 3, "representation_size": 10},
    "dropouts": {
        "num_tokens": 3,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "stochastic_depth": 0.2,
    },
}


def build(seed=0, **arguments):
    model = vit(CONFIG, **{"input_shape": SHAPE, "num_classes": 5, **arguments})
    randomize_weights(model, seed)
    return model


@pytest.fixture
def cheap_weights(monkeypatch):
    """Zeros for random numbers: only the sizes of big models are looked at."""
    for name in ("GlorotUniform", "LecunNormal", "RandomNormal"):
        monkeypatch.setattr(
            getattr(keras.initializers, name),
            "__call__",
            lambda self, shape, dtype=None: ops.zeros(shape, dtype or "float32"),
        )


# Exact parameters at 384 pixels with 1000 classes: no tokens, `v1` (the paper's 3
# convolutions) and `v10` (LayerNorm and 4 convolutions).
TABLE_1 = [
    ("S/32", {}, 22_914_664, 22_914_664),
    ("B/32", {}, 88_295_656, 88_295_656),
    ("B/16", {}, 86_857_960, 86_857_960),
    ("S/32", {"num_tokens": 8}, 22_943_464, 22_944_808),
    ("B/16", {"num_tokens": 8}, 86_914_408, 86_916_520),
    ("S/32", {"num_tokens": 8, "num_layers": 22}, 40_688_104, 40_689_448),
    ("B/32", {"num_tokens": 8, "num_layers": 20}, 145_055_080, 145_057_192),
    ("B/16", {"num_tokens": 8, "num_layers": 21}, 150_705_256, 150_707_368),
    ("B/16", {"num_tokens": 16, "num_layers": 21}, 150_764_008, 150_767_848),
    ("B/16", {"num_tokens": 16}, 86_973_160, 86_977_000),
]


@pytest.mark.parametrize(("variant", "arguments", "v1", "v10"), TABLE_1)
def test_parameters_of_table_1(variant, arguments, v1, v10, cheap_weights):
    for token_learner, expected in (("v1", v1), ("v10", v10)):
        model = vit(variant, (384, 384, 3), token_learner=token_learner, **arguments)
        assert model.count_params() == expected
        if "num_tokens" not in arguments:
            break


def test_parameters_of_b16_at_224(cheap_weights):
    assert vit("B/16").count_params() == 86_566_120
    # The published class-token model: 1 token and 1 position more.
    assert vit("B/16", classifier="token").count_params() == 86_567_656


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, cheap_weights):
    """Every variant's sizes, on two of its blocks."""
    patch_size, config = int(variant.split("/")[1]), VARIANTS[variant]
    sizes = {
        "Ti": (192, 12, 3, 768),
        "S": (384, 12, 6, 1536),
        "B": (768, 12, 12, 3072),
        "L": (1024, 24, 16, 4096),
        "H": (1280, 32, 16, 5120),
    }[variant.split("/")[0]]
    assert (
        config.hidden_dim,
        config.num_layers,
        config.num_heads,
        config.mlp_dim,
    ) == sizes
    assert config.patch_size == patch_size
    model = vit(variant, (2 * patch_size, 3 * patch_size, 3), 7, 2, num_tokens=4)
    assert model.output_shape == (None, 7)
    assert model.name == "vit_" + variant.lower().replace("/", "_")
    assert model.get_layer("patch_embedding").output.shape == (None, 6, sizes[0])
    block = model.get_layer("block_1")
    assert block.attention.num_heads == sizes[2]
    assert block.attention.key_dim * sizes[2] == sizes[0]
    assert block.mlp_dim == sizes[3]


@pytest.mark.parametrize("name", BUILDERS)
def test_round_trip_and_batch_sizes(name, tmp_path):
    model = build(**BUILDERS[name])
    x = random_like((3, *SHAPE))
    outputs = model(x)
    model.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(reloaded(x), outputs)
    assert [layer.name for layer in reloaded.layers] == [
        layer.name for layer in model.layers
    ]
    assert_close(reloaded(x[:1]), to_numpy(outputs)[0][:1], 1e-4)
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    assert_close(twin(x), outputs)


@pytest.mark.tensorflow
@pytest.mark.parametrize("name", ["v1", "v11", "class_token", "fuser_token"])
def test_xla_equals_eager(name):
    import tensorflow as tf

    model = build(**BUILDERS[name])
    x = random_like((2, *SHAPE))
    assert_close(tf.function(model, jit_compile=True)(x), model(x))


@pytest.mark.parametrize("name", ["v1", "class_token", "fuser", "fuser_token"])
def test_gradients_reach_every_weight(name):
    model = build(**BUILDERS[name])
    for path, gradient in gradients(model, random_like((2, *SHAPE))).items():
        assert gradient is not None, path
        is_map_bias = "token_learner" in path and path.endswith("dense_1/bias")
        if path.endswith("key/bias") or is_map_bias:
            continue  # A softmax ignores them.
        if name == "fuser_token" and "token_fuser_3/" in path:
            continue  # A class token is read off before the last fuser.
        assert np.any(gradient != 0), path


@pytest.mark.parametrize(
    "name", ["v1", pytest.param("fuser_token", marks=pytest.mark.slow), "dropouts"]
)
def test_training_lowers_the_loss(name):
    model = vit(CONFIG, SHAPE, 3, **BUILDERS[name])
    # Zero head kernel: the first logits are all zero.
    x = random_like((12, *SHAPE))
    np.testing.assert_array_equal(ops.convert_to_numpy(model(x)), 0)
    y = np.arange(12) % 3
    model.compile(
        optimizer=keras.optimizers.Adam(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(x, y, epochs=20, batch_size=6, verbose=0)
    # It starts at log(3); dropout is off while it is measured.
    assert model.evaluate(x, y, verbose=0) < 0.7 * np.log(3)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", ["v1", "class_token", "fuser", "pre_logits"])
def test_mixed_precision(policy, name):
    reference = build(**BUILDERS[name])
    x = random_like((2, *SHAPE))
    models = [vit(CONFIG, SHAPE, 5, dtype=policy, **BUILDERS[name])]
    keras.config.set_dtype_policy(policy)
    models.append(vit(CONFIG, SHAPE, 5, **BUILDERS[name]))
    for model in models:
        model.set_weights(reference.get_weights())
        assert model.get_layer("block_0").compute_dtype == policy.removeprefix("mixed_")
        assert model.get_layer("head").compute_dtype == "float32"
        outputs = model(x)
        assert keras.backend.standardize_dtype(outputs.dtype) == "float32"
        assert all(v.dtype == "float32" for v in model.trainable_weights)
        assert_close(outputs, reference(x), 0.05)


@pytest.mark.parametrize(
    ("location", "num_layers", "index"),
    [
        (0.5, 4, 2),
        (0.5, 5, 2),
        (0.75, 4, 3),
        (0.0, 4, 0),
        (0, 4, 0),
        (3, 4, 3),
        (0.99, 4, 3),
        (0.5, 1, 0),
    ],
)
def test_location(location, num_layers, index):
    model = build(num_layers=num_layers, num_tokens=3, tokenizer_location=location)
    for layer in range(num_layers):
        positions = model.get_layer(f"block_{layer}").output.shape[1]
        assert positions == (24 if layer < index else 3)


def test_is_the_chain_of_its_layers():
    """The functional graph is the documented sequence of named layers."""
    model = build(num_tokens=3, classifier="token", representation_size=10)
    x = random_like((2, *SHAPE))
    y = model.get_layer("patch_embedding")(x)
    y = model.get_layer("class_token")(y)
    y = model.get_layer("position_embedding")(y)
    for index in range(2):
        y = model.get_layer(f"block_{index}")(y)
    patches = ops.reshape(y[:, 1:], (2, 4, 6, 16))
    learned = model.get_layer("token_learner")(patches)
    y = ops.concatenate([y[:, :1], learned], axis=1)
    for index in range(2, 4):
        y = model.get_layer(f"block_{index}")(y)
    y = model.get_layer("encoder_norm")(y)[:, 0]
    features = model.get_layer("pre_logits")(y)
    assert_close(model.get_layer("head")(features), model(x))
    for name, expected in [("token_learner", learned), ("pool", y)]:
        extractor = keras.Model(model.input, model.get_layer(name).output)
        assert_close(extractor(x), expected)
    # tanh
    extractor = keras.Model(model.input, model.get_layer("pre_logits").output)
    assert np.abs(to_numpy(extractor(x))[0]).max() <= 1


def test_fuser_encoder_is_the_chain_of_its_layers():
    model = build(num_tokens=3, token_fuser=True, classifier="token")
    x = random_like((2, *SHAPE))
    y = keras.Model(model.input, model.get_layer("block_1").output)(x)
    token, y = y[:, :1], y[:, 1:]
    for index in (2, 3):
        fuser = model.get_layer(f"token_fuser_{index}")
        assert isinstance(fuser, TokenFuser)
        assert fuser.mode == "attention"
        assert fuser.residual
        tokens = model.get_layer(f"token_learner_{index}")(
            ops.reshape(y, (2, 4, 6, 16))
        )
        tokens = ops.concatenate([token, tokens], axis=1)
        tokens = model.get_layer(f"block_{index}")(tokens)
        token, tokens = tokens[:, :1], tokens[:, 1:]
        y = fuser([tokens, y])
    y = model.get_layer("encoder_norm")(ops.concatenate([token, y], axis=1))
    assert y.shape == (2, 25, 16)
    assert_close(model.get_layer("head")(y[:, 0]), model(x))


def test_gap_is_the_mean_of_the_features():
    model = build(num_tokens=3)
    features = build(num_tokens=3, classifier=None)
    features.set_weights(model.get_weights()[: len(features.weights)])
    x = random_like((2, *SHAPE))
    expected = model.get_layer("head")(ops.mean(features(x), axis=1))
    assert_close(model(x), expected)


def test_attention_maps_by_layer_name():
    model = build(num_tokens=3)
    grid = keras.Model(model.input, model.get_layer("grid").output)
    tokens, maps = model.get_layer("token_learner")(
        grid(random_like((2, *SHAPE))), return_attention_maps=True
    )
    assert tokens.shape == (2, 3, 16)
    assert maps.shape == (2, 3, 4, 6)


def test_stochastic_depth_grows_linearly():
    model = build(stochastic_depth=0.3)
    rates = [model.get_layer(f"block_{i}").stochastic_depth for i in range(4)]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3])


def test_classifier_activation_gives_probabilities():
    outputs = build(classifier_activation="softmax")(random_like((2, *SHAPE)))
    np.testing.assert_allclose(to_numpy(outputs)[0].sum(-1), 1, rtol=1e-5)


def test_token_learner_function(tmp_path):
    received = []

    def make(num_tokens):
        received.append(num_tokens)
        return TokenLearner.v11(num_tokens, bottleneck_dim=6)

    model = build(num_tokens=3, token_learner=make)
    assert received == [3]
    layer = model.get_layer("token_learner")
    assert layer.bottleneck_dim == 6
    model.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    x = random_like((2, *SHAPE))
    assert_close(reloaded(x), model(x))
    fused = build(num_tokens=3, token_learner=make, token_fuser=True)
    assert received == [3, 3, 3]
    assert fused.get_layer("token_learner_3").bottleneck_dim == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"tokenizer_location": 1.5},
            r"`tokenizer_location` must be .* \[0, 1\) of the 4 blocks.*=1\.5",
        ),
        ({"tokenizer_location": -1}, r"`tokenizer_location` must be .*=-1"),
        ({"tokenizer_location": 4}, r"`tokenizer_location` must be .* 4 blocks.*=4"),
        ({"tokenizer_location": 1.0}, r"`tokenizer_location` must be .*=1\.0"),
        ({"tokenizer_location": float("nan")}, r"`tokenizer_location` must be .*=nan"),
        ({"tokenizer_location": "middle"}, r"`tokenizer_location` must be .*'middle'"),
        ({"tokenizer_location": True}, r"`tokenizer_location` must be .*=True"),
        ({"num_tokens": 0}, "`num_tokens` must be an integer of at least 1.*=0"),
        ({"num_tokens": -1}, "`num_tokens` must be an integer of at least 1.*=-1"),
        ({"num_tokens": 2.5}, r"`num_tokens` must be an integer of at least 1.*=2\.5"),
        ({"num_tokens": 25}, "must be at most the number of positions.*=25 for 4 x 6"),
        ({"num_tokens": None, "token_fuser": True}, "needs `num_tokens`"),
        ({"token_learner": "v2"}, r"`token_learner`. Expected one of .*'v11'.*'v2'"),
        ({"token_learner": lambda n: None}, "a function that returned None"),
        ({"classifier": "mean"}, r"`classifier`. Expected one of .*'gap'.*'mean'"),
        ({"num_classes": 0}, "`num_classes` must be an integer of at least 1"),
        ({"num_layers": 0}, "`num_layers` must be an integer of at least 1"),
        ({"representation_size": -3}, "`representation_size` must be an integer"),
        ({"dropout": 1.0}, r"`dropout` must be a number in \[0, 1\)"),
        ({"attention_dropout": -0.1}, "`attention_dropout` must be a number"),
        ({"stochastic_depth": 1.2}, "`stochastic_depth` must be a number"),
        (
            {"input_shape": (16, 22, 3)},
            r"`patch_size` of layer 'patch_embedding' must divide .*\(16, 22\)",
        ),
        ({"input_shape": (16, 16)}, r"`input_shape` must be .*\(height, width, chan"),
        ({"input_shape": (None, None, 3)}, "`input_shape` must be positive integers"),
        ({"input_shape": 224}, "`input_shape` must be positive integers"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**{"num_tokens": 3, **arguments})


def test_location_12_of_12():
    with pytest.raises(ValueError, match=r"of the 12 blocks.*tokenizer_location=12"):
        vit("S/32", num_tokens=8, tokenizer_location=12)


def test_image_size_that_the_patch_size_does_not_divide():
    with pytest.raises(ValueError, match=r"`patch_size` .* must divide .*\(225, 224\)"):
        vit("B/16", (225, 224, 3))


@pytest.mark.parametrize("variant", ["B/8", "b/16", "XL/16", 16, None])
def test_unknown_variant(variant):
    with pytest.raises(ValueError, match=r"`variant`. Expected one of .*'Ti/16'.*H/14"):
        vit(variant)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 16, 4, 2, 24), r"`patch_size\[0\]` must be an integer of at least 1"),
        ((4, 16.0, 4, 2, 24), "`hidden_dim` must be an integer of at least 1"),
        ((4, 16, 4, 3, 24), "`num_heads` must divide `hidden_dim`"),
    ],
)
def test_bad_config(sizes, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(*sizes)
