import re
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import tokenlearner_keras as tlk
from tests.contract import BACKEND, assert_close, random_like, randomize_weights
from tokenlearner_keras.insertion import (
    LayerAdapter,
    initialize_as_regions,
    region_maps,
)
from tokenlearner_keras.layers import TokenLearner

CONFIG = dict(patch_size=8, hidden_dim=16, num_layers=4, num_heads=2, mlp_dim=32)
IMAGES = random_like((2, 32, 48, 3))
SQUARES = random_like((2, 32, 32, 3))


def call(model, inputs):
    return np.asarray(ops.convert_to_numpy(model(inputs, training=False)))


def our_vit(classifier="token", input_shape=(32, 48, 3), **arguments):
    model = tlk.models.vit(
        tlk.models.ViTConfig(**CONFIG),
        input_shape=input_shape,
        num_classes=5,
        classifier=classifier,
        **arguments,
    )
    randomize_weights(model, scale=0.2)
    return model


def own_model(
    tokens=24, channels=16, blocks=3, head="gap", positions_in_block=False, specials=0
):
    """A user's own ViT from bare Keras layers and ops: no custom class, no nesting."""
    inputs = keras.Input((32, 48, 3), name="pixels")
    x = keras.layers.Conv2D(channels, 8, strides=8, name="stem")(inputs)
    x = keras.layers.Reshape((24, channels))(x)
    if specials:
        x = keras.layers.ZeroPadding1D((0, specials), name="specials")(x)
    for index in range(blocks):
        if positions_in_block:
            x = x + np.ones((1, 24 + specials, channels), "float32")
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.MultiHeadAttention(2, 8, name=f"attention_{index}")(y, y)
        x = keras.layers.Add()([x, y])
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(32, activation="relu")(y)
        x = x + keras.layers.Dense(channels)(y)
    x = ops.mean(x, axis=1) if head == "gap" else keras.layers.Flatten()(x)
    model = keras.Model(inputs, keras.layers.Dense(5, name="scores")(x))
    randomize_weights(model, scale=0.2)
    return model


def prefix_model(model, layer):
    """The model up to the input of a layer."""
    return keras.Model(model.inputs, model.get_layer(layer).input)


def assert_inserted(model, inputs, num_tokens, prefix, grid_shape, tmp_path, **where):
    """Everything that an insertion promises."""
    before = call(model, inputs)
    weights = [np.asarray(ops.convert_to_numpy(w)) for w in model.weights]
    new = tlk.insert_token_learner(model, num_tokens=num_tokens, **where)
    layer = new.get_layer("token_learner")
    assert layer.grid_shape == grid_shape
    positions = int(np.prod(grid_shape))
    assert layer.input.shape[1] == positions
    assert tuple(layer.output.shape[1:]) == (num_tokens, layer.input.shape[-1])
    if prefix:
        joined = new.get_layer("token_learner_concat").output
        assert joined.shape[1] == prefix + num_tokens

    # The original is untouched, the copy has weights of its own.
    assert np.array_equal(call(model, inputs), before)
    for a, b in zip(weights, model.weights):
        assert np.array_equal(a, ops.convert_to_numpy(b))
    assert not {id(w) for w in new.weights} & {id(w) for w in model.weights}
    assert len(new.weights) == len(weights) + len(layer.weights)

    # `.keras`, then out again: the very outputs of the original.
    path = tmp_path / "inserted.keras"
    new.save(path)
    outputs = call(new, inputs)
    reloaded = keras.saving.load_model(path)
    assert np.array_equal(call(reloaded, inputs), outputs)
    removed = tlk.remove_token_learner(reloaded)
    assert np.array_equal(call(removed, inputs), before)
    assert not any(isinstance(x, TokenLearner) for x in removed.layers)
    assert len(removed.weights) == len(weights)

    # Shared: training the new model trains the old one.
    shared = tlk.insert_token_learner(
        model, num_tokens=num_tokens, share_weights=True, **where
    )
    assert {id(w) for w in model.weights} <= {id(w) for w in shared.weights}
    shared.get_layer("token_learner").set_weights(layer.get_weights())
    assert_close(call(shared, inputs), outputs, 1e-6)
    removed = tlk.remove_token_learner(shared, share_weights=True)
    assert np.array_equal(call(removed, inputs), before)
    return new


@pytest.mark.parametrize("classifier", ["gap", "token", None])
def test_our_vit(classifier, tmp_path):
    model = our_vit(classifier)
    assert [p.layer for p in tlk.insertion_places(model)] == [
        f"block_{i}" for i in range(4)
    ]
    prefix = int(classifier == "token")
    new = assert_inserted(model, IMAGES, 4, prefix, (4, 6), tmp_path)
    assert new.output_shape == (
        (None, 5) if classifier is not None else (None, 4 + prefix, 16)
    )
    # The same as a ViT built with its TokenLearner, given the same weights.
    built = our_vit(classifier, num_tokens=4)
    built.set_weights(new.get_weights())
    assert_close(call(built, IMAGES), call(new, IMAGES), 1e-6)


def test_own_functional_model(tmp_path):
    model = own_model()
    places = tlk.insertion_places(model)
    assert [p.index for p in places] == [0, 1, 2]
    assert [(p.num_tokens, p.channels) for p in places] == [(24, 16)] * 3
    # floor(0.5 * 3) = 1: between two blocks, not between attention and MLP.
    new = assert_inserted(model, IMAGES, 3, 0, (4, 6), tmp_path)
    order = [layer.name for layer in new.layers]
    assert order.index("attention_0") < order.index("token_learner")
    assert order.index("token_learner") < order.index("attention_1")


def test_nested_models_of_one_layer_name_are_flattened(tmp_path):
    inner = own_model()
    backbone = keras.Model(inner.input, inner.layers[-2].output, name="backbone")
    inputs = keras.Input((32, 48, 3))
    x = keras.layers.Rescaling(2.0, name="stem")(
        inputs
    )  # the backbone has a "stem" too
    outputs = keras.layers.Dense(5, name="scores")(backbone(x))
    model = keras.Model(inputs, outputs)
    new = assert_inserted(model, IMAGES, 3, 0, (4, 6), tmp_path, location=2)
    assert {"stem", "stem_1"} <= {layer.name for layer in new.layers}


def test_what_comes_before_is_bit_for_bit_the_same():
    model = our_vit("token")
    new = tlk.insert_token_learner(model, num_tokens=4)
    old = prefix_model(model, "block_2")
    assert np.array_equal(
        call(prefix_model(new, "token_learner"), IMAGES), call(old, IMAGES)[:, 1:]
    )
    # The class token goes round the TokenLearner.
    joined = keras.Model(new.inputs, new.get_layer("token_learner_concat").output)
    assert np.array_equal(call(joined, IMAGES)[:, :1], call(old, IMAGES)[:, :1])


def test_special_tokens_after_the_patches(tmp_path):
    model = own_model(specials=3)
    new = tlk.insert_token_learner(model, location=0, num_tokens=4)
    assert new.get_layer("token_learner").grid_shape == (4, 6)
    joined = keras.Model(new.inputs, new.get_layer("token_learner_concat").output)
    old = keras.Model(model.inputs, model.get_layer("specials").output)
    assert np.array_equal(call(joined, IMAGES)[:, 4:], call(old, IMAGES)[:, 24:])
    removed = tlk.remove_token_learner(new)
    assert np.array_equal(call(removed, IMAGES), call(model, IMAGES))


def test_patches_that_are_not_square():
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(16, (4, 16), strides=(4, 16))(inputs)
    x = keras.layers.Reshape((16, 16))(x)  # a grid of 8 x 2, not of 4 x 4
    x = x + keras.layers.MultiHeadAttention(2, 8)(x, x)
    model = keras.Model(inputs, ops.mean(x, axis=1))
    new = tlk.insert_token_learner(model, location=0, num_tokens=2)
    assert new.get_layer("token_learner").grid_shape == (8, 2)


def test_video_transformer(tmp_path):
    model = tlk.models.vivit(
        tlk.models.ViTConfig(**CONFIG),
        input_shape=(4, 16, 24, 3),
        tubelet_size=(2, 8, 8),
        num_classes=5,
    )
    randomize_weights(model, scale=0.2)
    clips = random_like((2, 4, 16, 24, 3))
    new = tlk.insert_token_learner(model, num_tokens=2)
    layer = new.get_layer("token_learner")
    assert tuple(layer.input.shape) == (None, 2, 2, 3, 16)
    assert tuple(layer.output.shape) == (None, 4, 16)
    removed = tlk.remove_token_learner(new)
    assert np.array_equal(call(removed, clips), call(model, clips))


@pytest.mark.parametrize(
    ("location", "index"),
    [(0.0, 0), (0.5, 2), (0.99, 3), (0, 0), (3, 3), ("block_1", 1)],
)
def test_locations(location, index):
    new = tlk.insert_token_learner(our_vit(), location, num_tokens=2)
    order = [layer.name for layer in new.layers]
    blocks = [name for name in order[order.index("token_learner") :] if "block" in name]
    assert blocks == [f"block_{i}" for i in range(index, 4)]


@pytest.mark.parametrize("variant", ["v1", "video", "v10", "v11"])
def test_variants_and_arguments(variant):
    new = tlk.insert_token_learner(
        our_vit(), num_tokens=4, token_learner=variant, dropout=0.25, name="learner"
    )
    expected = getattr(TokenLearner, variant)(
        4, dropout=0.25, grid_shape=(4, 6), name="learner"
    )
    assert new.get_layer("learner").get_config() == expected.get_config()


def test_a_tokenizer_of_your_own():
    new = tlk.insert_token_learner(
        our_vit(input_shape=(32, 32, 3)),
        num_tokens=4,
        token_learner=lambda n: TokenLearner(n, attention="mlp", name="own"),
    )
    assert new.get_layer("token_learner").output.shape[1] == 4
    assert call(new, SQUARES).shape == (2, 5)


def test_trainable_flags_are_copied():
    model = our_vit()
    model.get_layer("block_0").trainable = False
    new = tlk.insert_token_learner(model, num_tokens=4)
    assert not new.get_layer("block_0").trainable
    assert new.get_layer("block_1").trainable


def test_insert_after_loading_a_saved_model(tmp_path):
    # The names of its ops were given in another process, and may come again.
    model = our_vit("token")
    path = tmp_path / "model.keras"
    model.save(path)
    expected = call(model, IMAGES)
    keras.utils.clear_session()
    loaded = keras.saving.load_model(path)
    new = tlk.insert_token_learner(loaded, num_tokens=4)
    assert np.array_equal(call(tlk.remove_token_learner(new), IMAGES), expected)


def test_remove_from_a_vit_built_with_a_token_learner():
    built = our_vit("token", num_tokens=4)
    removed = tlk.remove_token_learner(built)
    plain = our_vit("token")
    plain.set_weights(removed.get_weights())
    assert_close(call(removed, IMAGES), call(plain, IMAGES), 1e-6)


@pytest.mark.parametrize("variant", ["v1", "video", "v11"])
@pytest.mark.parametrize("num_tokens", [4, 8])
def test_regions(variant, num_tokens):
    # Every position has a code, as position embeddings give it, and content.
    codes = random_like((1, 48, 64), 1)
    features = codes + 0.3 * random_like((32, 48, 64), 2)
    layer = getattr(TokenLearner, variant)(num_tokens, grid_shape=(6, 8))
    layer.build(features.shape)
    initialize_as_regions(layer, features[:16])
    tokens, maps = (
        np.asarray(ops.convert_to_numpy(x))
        for x in layer(features[16:], return_attention_maps=True)
    )
    regions = region_maps(num_tokens, 6, 8)
    for s in range(num_tokens):
        mean = maps[:, s].mean(0)
        assert np.corrcoef(mean.ravel(), regions[s].ravel())[0, 1] > 0.9
        # Its own region's position sees more of it than any other region's centre.
        peaks = regions.reshape(num_tokens, -1).argmax(1)
        assert mean.ravel()[peaks].argmax() == s
    if layer.pooling == "sum":
        want = np.einsum("shw,bhwc->bsc", regions, features[16:].reshape(16, 6, 8, 64))
        assert 0.8 < np.linalg.norm(tokens) / np.linalg.norm(want) < 1.3


def test_region_maps_are_spread():
    maps = region_maps(6, 8, 12)
    np.testing.assert_allclose(maps.sum((1, 2)), 1)
    owners = maps.argmax(0)
    assert [np.sum(owners == s) for s in range(6)] == [16] * 6


@pytest.mark.parametrize("location", [0, 2])
def test_insert_as_regions(location):
    """Positions are smooth, as in a trained ViT, and the images' content is noise."""
    model = our_vit("gap")
    y, x = np.meshgrid(np.linspace(0, 1, 4), np.linspace(0, 1, 6), indexing="ij")
    waves = [f(np.pi * k * z) for k in (1, 2) for z in (y, x) for f in (np.sin, np.cos)]
    waves = 2 * np.stack(waves, -1).reshape(24, 8)
    positions = model.get_layer("position_embedding").weights[0]
    positions.assign((waves @ random_like((8, 16), 3)).reshape(positions.shape))
    arguments = dict(location=location, num_tokens=4, token_learner="v11")
    fitted_on, others = random_like((64, 32, 48, 3), 4), random_like((16, 32, 48, 3), 5)

    def correlations(new):
        layer = new.get_layer("token_learner")
        features = prefix_model(new, "token_learner")(others)
        maps = layer(features, return_attention_maps=True)[1]
        maps = ops.convert_to_numpy(maps).mean(0)
        pairs = zip(maps, region_maps(4, 4, 6))
        return [np.corrcoef(m.ravel(), r.ravel())[0, 1] for m, r in pairs]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The structure of `inputs`")
        new = tlk.insert_token_learner(model, regions_from=fitted_on, **arguments)
    assert min(correlations(new)) > 0.85, "the maps are not the regions"
    random = tlk.insert_token_learner(model, **arguments)
    assert min(correlations(random)) < 0.5, "the test tells nothing"


def test_regions_need_no_bias_where_a_softmax_sees_none():
    # Codes without a constant among them: a fit through zero would be poor.
    codes = random_like((48, 64), 1)
    codes -= codes.mean(0)
    features = np.broadcast_to(codes, (4, 48, 64)).copy()
    layer = TokenLearner.v11(4, use_bias=False, grid_shape=(6, 8))
    layer.build(features.shape)
    initialize_as_regions(layer, features)
    maps = ops.convert_to_numpy(layer(features, return_attention_maps=True)[1])[0]
    for found, region in zip(maps, region_maps(4, 6, 8)):
        assert np.corrcoef(found.ravel(), region.ravel())[0, 1] > 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(location=4), "the index of a block, from 0 to 3. Received: location=4"),
        (dict(location=1.0), "a float in [0, 1). Received: location=1.0"),
        (dict(location="head"), "the name of a layer before which"),
        (dict(location=None), "a float, an int or the name of a layer"),
        (dict(num_tokens=0), "`num_tokens` must be an integer of at least 1"),
        (dict(num_tokens=25), "`num_tokens` must be at most the number of patch"),
        (dict(token_learner="v2"), "Invalid value for argument `token_learner`"),
        (dict(token_learner=lambda n: n), "must return a Keras layer"),
        (dict(grid_shape=(5, 5)), "must add up to the number of tokens, 25"),
        (dict(num_prefix_tokens=-1), "`num_prefix_tokens` must be an integer of at"),
    ],
)
def test_misuse(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tlk.insert_token_learner(our_vit(), **arguments)


def test_errors_list_the_candidate_places():
    listed = re.escape(
        "Candidate places: 0: before layer 'block_0' (25 tokens of 16 channels); 1: "
        "before layer 'block_1' (25 tokens of 16 channels)"
    )
    with pytest.raises(ValueError, match=listed):
        tlk.insert_token_learner(our_vit(), location=9)
    # The layers after the place need all tokens.
    with pytest.raises(ValueError, match="layer 'scores' after it does not take") as e:
        tlk.insert_token_learner(own_model(head="flatten"), num_tokens=4)
    assert "Candidate places: 0: before layer" in str(e.value)
    with pytest.raises(ValueError, match="after it does not take another number"):
        tlk.insert_token_learner(own_model(positions_in_block=True), num_tokens=4)


def test_models_without_a_place():
    inputs = keras.Input((8, 8, 3))
    convolutional = keras.Model(inputs, keras.layers.Conv2D(4, 3)(inputs))
    with pytest.raises(ValueError, match="no place for a TokenLearner"):
        tlk.insert_token_learner(convolutional)

    class Subclassed(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="must be a functional Keras model"):
        tlk.insert_token_learner(Subclassed())
    with pytest.raises(ValueError, match=r"has \[\]\. Received: name=None"):
        tlk.remove_token_learner(our_vit())


def test_unknown_grid_asks_for_it():
    inputs = keras.Input((12, 16))  # tokens, whatever they come from
    x = inputs + keras.layers.MultiHeadAttention(2, 8)(inputs, inputs)
    model = keras.Model(inputs, x)
    with pytest.raises(
        ValueError, match=r"Cannot tell the grid .* for 12 patch tokens"
    ):
        tlk.insert_token_learner(model, num_tokens=2)
    new = tlk.insert_token_learner(model, num_tokens=2, grid_shape=(3, 4))
    assert new.output_shape == (None, 2, 16)


# KerasHub. Its ViT layers only load inside their own backbone class, hence the adapters.


@pytest.fixture(scope="module")
def keras_hub():
    return pytest.importorskip(
        "keras_hub",
        reason="needs keras-hub: pip install --no-deps -r tests/requirements-hub.txt",
        exc_type=ImportError,
    )


def hub_vit(keras_hub, **arguments):
    arguments = {"image_shape": (32, 48, 3), **CONFIG, **arguments}
    return keras_hub.models.ViTBackbone(**arguments)


def test_keras_hub_vit_backbone(keras_hub, tmp_path):
    model = hub_vit(keras_hub, use_patch_bias=False)
    randomize_weights(model, scale=0.2)
    new = assert_inserted(model, IMAGES, 4, 1, (4, 6), tmp_path)
    assert new.output_shape == (None, 5, 16)
    blocks = [x for x in new.layers if isinstance(x, LayerAdapter)]
    assert len(blocks) == 5  # the embedding and four blocks
    # Bit for bit what the encoder computes before its third block.
    encoder = model.layers[-1]
    tokens = model.layers[1](IMAGES)
    for block in encoder.encoder_layers[:2]:
        tokens = block(tokens)
    learned = call(prefix_model(new, "token_learner"), IMAGES)
    assert np.array_equal(learned, ops.convert_to_numpy(tokens)[:, 1:])


@pytest.mark.parametrize("pooling", ["token", "gap"])
def test_keras_hub_classifier(keras_hub, pooling, tmp_path):
    backbone = hub_vit(keras_hub, use_class_token=pooling == "token")
    model = keras_hub.models.ViTImageClassifier(
        backbone=backbone, num_classes=5, pooling=pooling
    )
    randomize_weights(model, scale=0.2)
    prefix = int(pooling == "token")
    new = assert_inserted(model, IMAGES, 4, prefix, (4, 6), tmp_path)
    assert new.output_shape == (None, 5)


def test_keras_hub_deit(keras_hub, tmp_path):
    arguments = {**CONFIG, "intermediate_dim": CONFIG["mlp_dim"]}
    del arguments["mlp_dim"]
    model = keras_hub.models.DeiTBackbone(image_shape=(32, 48, 3), **arguments)
    randomize_weights(model, scale=0.2)
    # A class and a distillation token.
    assert_inserted(model, IMAGES, 4, 2, (4, 6), tmp_path)


def test_keras_hub_dinov2(keras_hub, tmp_path):
    arguments = {**CONFIG, "intermediate_dim": CONFIG["mlp_dim"]}
    del arguments["mlp_dim"]
    model = keras_hub.models.DINOV2Backbone(
        image_shape=(32, 32, 3),
        position_embedding_shape=(32, 32),
        num_register_tokens=4,
        **arguments,
    )
    # A class token and four registers: 21 tokens, 16 of them patches.
    new = assert_inserted(model, {"images": SQUARES}, 4, 5, (4, 4), tmp_path)
    assert new.output_shape == (None, 9, 16)


@pytest.mark.skipif(BACKEND == "torch", reason="`fit` is tested on two backends")
def test_inserted_model_trains(keras_hub):
    model = keras_hub.models.ViTImageClassifier(
        backbone=hub_vit(keras_hub), num_classes=5
    )
    new = tlk.insert_token_learner(model, num_tokens=4, token_learner="v11")
    new.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = new.fit(IMAGES, np.array([0, 3]), epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
