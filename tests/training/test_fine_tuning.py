import keras
import numpy as np
import pytest
from keras import ops
from scipy import ndimage

import tokenlearner_keras as tlk
from tests.contract import random_like, randomize_weights
from tokenlearner_keras.training import (
    VIT_FINE_TUNING,
    make_loss,
    make_optimizer,
    transfer_weights,
)

CONFIG = tlk.models.ViTConfig(
    patch_size=4, hidden_dim=16, num_layers=4, num_heads=2, mlp_dim=32
)
IMAGES = random_like((8, 16, 16, 3))
LARGE = random_like((8, 24, 32, 3))
TARGETS = np.eye(3, dtype="float32")[np.arange(8) % 3]


def vit(size=(16, 16), num_classes=5, random=False, **arguments):
    model = tlk.models.vit(
        CONFIG, input_shape=(*size, 3), num_classes=num_classes, **arguments
    )
    if random:
        randomize_weights(model, scale=0.3)
    return model


def values(model):
    return {w.path: np.array(ops.convert_to_numpy(w)) for w in model.weights}


def changed(before, model):
    after = values(model)
    return {path for path in before if not np.array_equal(before[path], after[path])}


def test_new_head_and_higher_resolution():
    source = vit(random=True, classifier="token")
    target = vit((24, 32), 3, classifier="token")
    report = transfer_weights(source, target)
    assert report.resized == ("position_embedding",)
    assert report.fresh == report.unused == ("head",)
    assert set(report.copied) == {
        *("patch_embedding", "class_token", "encoder_norm"),
        *(f"block_{i}" for i in range(4)),
    }
    # As the published code: scipy's zoom of the grid, the class token apart.
    old, new = (
        ops.convert_to_numpy(m.get_layer("position_embedding").weights[0]).reshape(
            -1, 16
        )
        for m in (source, target)
    )
    zoomed = ndimage.zoom(old[1:].reshape(4, 4, 16), (6 / 4, 8 / 4, 1), order=1)
    np.testing.assert_allclose(new[1:], zoomed.reshape(-1, 16), atol=1e-6)
    np.testing.assert_array_equal(new[0], old[0])
    # The new head starts from equal scores.
    assert np.all(ops.convert_to_numpy(target(LARGE)) == 0)


def test_the_same_size_is_the_same_model():
    source, target = vit(random=True), vit()
    report = transfer_weights(source, target)
    assert report.resized == report.fresh == report.unused == ()
    np.testing.assert_array_equal(
        ops.convert_to_numpy(source(IMAGES)), ops.convert_to_numpy(target(IMAGES))
    )


def test_into_a_vit_with_token_learner():
    report = transfer_weights(vit(random=True), vit(num_tokens=4))
    assert report.fresh == ("token_learner",)


def test_models_that_do_not_fit():
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="other")])
    with pytest.raises(ValueError, match="layers of the same names and shapes"):
        transfer_weights(vit(), other)
    with pytest.raises(ValueError, match="equally many class tokens"):
        transfer_weights(vit(classifier="token"), vit((24, 32)))


def test_the_protocol_trains():
    model = vit((24, 32), 3, num_tokens=4)
    transfer_weights(vit(random=True), model)
    optimizer = make_optimizer(VIT_FINE_TUNING, num_steps=12)
    model.compile(optimizer, make_loss(VIT_FINE_TUNING, from_logits=True))
    losses = model.fit(LARGE, TARGETS, epochs=12, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert float(optimizer.learning_rate) < 1e-3


def test_layer_wise_freezing():
    source = vit(random=True)
    model = tlk.insert_token_learner(source, 0.5, 4)
    # All that stands before the TokenLearner.
    for layer in model.layers:
        if layer.name == "token_learner":
            break
        layer.trainable = False
    before = values(model)
    model.compile("adam", keras.losses.CategoricalCrossentropy(from_logits=True))
    model.fit(IMAGES, np.eye(5, dtype="float32")[np.arange(8) % 5], verbose=0)
    frozen = ("patch_embedding", "position_embedding", "block_0", "block_1")
    trained = {path.split("/")[0] for path in changed(before, model)}
    assert trained == {"token_learner", "block_2", "block_3", "encoder_norm", "head"}
    assert not trained & set(frozen)


@pytest.mark.slow
def test_lora(tmp_path):
    source = vit(random=True)
    model = tlk.insert_token_learner(source, 0.5, 4, token_learner="v11")
    expected = ops.convert_to_numpy(model(IMAGES))
    before = values(model)
    for layer in model._flatten_layers():
        if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense)):
            layer.enable_lora(2)
    # It starts as what it was, and far fewer numbers are trained.
    np.testing.assert_allclose(
        ops.convert_to_numpy(model(IMAGES)), expected, rtol=1e-5, atol=1e-5
    )
    kernels = {path for path in before if path.endswith("kernel")}
    learner = [p for p in kernels if p.startswith("token_learner")]
    assert len(learner) == 2
    model.compile("adam", keras.losses.CategoricalCrossentropy(from_logits=True))
    model.fit(IMAGES, np.eye(5, dtype="float32")[np.arange(8) % 5], verbose=0)
    lora = [w for w in model.trainable_weights if "lora" in w.path]
    blocks = [w for w in lora if "block_3" in w.path]
    assert len(blocks) == 2 * 6  # query, key, value, output and the two of the MLP
    dense = {p for p in kernels if "patch_embedding" not in p}
    assert not changed(before, model) & dense
    # A save folds it into the kernels.
    path = tmp_path / "model.keras"
    outputs = ops.convert_to_numpy(model(IMAGES))
    model.save(path)
    reloaded = keras.saving.load_model(path)
    np.testing.assert_allclose(
        ops.convert_to_numpy(reloaded(IMAGES)), outputs, atol=1e-5
    )
