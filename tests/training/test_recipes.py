import dataclasses
import subprocess
import sys

import keras
import numpy as np
import pytest

from tokenlearner_keras.training import recipes
from tokenlearner_keras.training.recipes import (
    AVID,
    CHARADES,
    RECIPES,
    VIT_FINE_TUNING,
    Recipe,
    global_batch_size,
    make_loss,
    make_optimizer,
    make_schedule,
)


def test_the_papers_figures():
    assert (CHARADES.base_learning_rate, CHARADES.batch_size) == (0.8, 4)
    assert (AVID.base_learning_rate, AVID.batch_size) == (0.025, 8)
    assert CHARADES.num_steps == AVID.num_steps == 100_000
    assert (CHARADES.label_smoothing, AVID.label_smoothing) == (0.0, 0.2)
    assert (CHARADES.num_classes, AVID.num_classes) == (157, 887)
    for recipe in (CHARADES, AVID):
        assert recipe.clip_length == 64
        assert recipe.train_size == (224, 224)
        assert recipe.test_size == (256, 256)
    # "4*64=256 was our batch size".
    assert global_batch_size(CHARADES, CHARADES.replicas) == 256
    assert set(RECIPES) == {"charades", "avid", "vit_fine_tuning"}


def test_the_figures_of_vit_fine_tuning():
    recipe = VIT_FINE_TUNING
    assert (recipe.base_learning_rate, recipe.batch_size) == (0.03, 512)
    assert (recipe.num_steps, recipe.warmup_steps) == (20_000, 500)
    assert (recipe.momentum, recipe.global_clipnorm) == (0.9, 1.0)
    assert recipe.train_size == (384, 384)


@pytest.mark.parametrize("replicas", [1, 8, 64])
@pytest.mark.parametrize("recipe", [CHARADES, AVID])
def test_scaling_to_the_replicas(recipe, replicas):
    schedule = make_schedule(recipe, replicas)
    rate = recipe.base_learning_rate * replicas
    for step in (0, 25_000, 50_000, 100_000):
        expected = rate * 0.5 * (1 + np.cos(np.pi * step / 100_000))
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-5 * rate)
    assert global_batch_size(recipe, replicas) == recipe.batch_size * replicas


def test_a_batch_of_the_whole_run_is_not_scaled():
    assert global_batch_size(VIT_FINE_TUNING, 8) == 512
    schedule = make_schedule(VIT_FINE_TUNING, 8)
    assert float(schedule(0)) == 0.0
    assert float(schedule(250)) == pytest.approx(0.015)
    assert float(schedule(500)) == pytest.approx(0.03)
    assert float(schedule(10_250)) == pytest.approx(0.015)
    assert float(schedule(20_000)) == pytest.approx(0.0, abs=1e-8)
    with pytest.raises(ValueError, match="batch_size=512, replicas=7"):
        global_batch_size(VIT_FINE_TUNING, 7)


def test_a_shorter_run():
    schedule = make_schedule(VIT_FINE_TUNING, num_steps=2000)
    assert float(schedule(50)) == pytest.approx(0.03)
    assert float(schedule(2000)) == pytest.approx(0.0, abs=1e-8)
    schedule = make_schedule(CHARADES, 1, num_steps=10)
    assert float(schedule(5)) == pytest.approx(0.4)
    assert float(make_schedule(VIT_FINE_TUNING, num_steps=1)(0)) == pytest.approx(0.03)


def test_optimizer():
    optimizer = make_optimizer(CHARADES, 2)
    assert isinstance(optimizer, keras.optimizers.SGD)
    assert optimizer.momentum == 0.9
    assert float(optimizer.learning_rate) == pytest.approx(1.6)
    assert make_optimizer(VIT_FINE_TUNING).global_clipnorm == 1.0
    assert optimizer.get_config()["learning_rate"]["class_name"] == "CosineDecay"


def test_losses():
    targets, scores = np.array([[1.0, 0.0, 0.0]]), np.array([[0.7, 0.2, 0.1]])
    expected = -np.mean(np.log([0.7, 0.8, 0.9]))
    assert float(make_loss(CHARADES)(targets, scores)) == pytest.approx(
        expected, rel=1e-4
    )
    smoothed = 0.8 * targets + 0.2 / 3
    expected = -np.sum(smoothed * np.log(scores))
    assert float(make_loss(AVID)(targets, scores)) == pytest.approx(expected, rel=1e-4)
    logits = np.log(scores)
    assert float(make_loss(AVID, from_logits=True)(targets, logits)) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_model_trains_by_a_recipe(name):
    recipe = dataclasses.replace(RECIPES[name], num_classes=3)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile(make_optimizer(recipe, 1, 20), make_loss(recipe, from_logits=True))
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((64, 4)).astype("float32")
    targets = np.eye(3, dtype="float32")[inputs[:, :3].argmax(axis=1)]
    history = model.fit(inputs, targets, batch_size=16, epochs=5, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]


def test_recipes_are_data_and_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CHARADES.batch_size = 8
    assert Recipe(**dataclasses.asdict(CHARADES)) == CHARADES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "detection"}, "Received: task='detection'"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"warmup_steps": 100_000}, "less than `num_steps`"),
    ],
)
def test_bad_recipes(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CHARADES, **change)
    with pytest.raises(ValueError, match="`replicas`"):
        make_schedule(CHARADES, 0)
    with pytest.raises(ValueError, match="`num_steps`"):
        make_schedule(CHARADES, 1, 0)


MIRRORED = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2
)
from tokenlearner_keras.training.recipes import *
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    rate = float(make_optimizer(CHARADES).learning_rate)
    print("RESULT", num_replicas(), global_batch_size(CHARADES), round(rate, 4))
"""


@pytest.mark.tensorflow
def test_the_replicas_at_hand_are_those_of_the_strategy():
    assert recipes.num_replicas() == 1
    result = subprocess.run(
        [sys.executable, "-c", MIRRORED], capture_output=True, text=True
    )
    assert "RESULT 2 8 1.6" in result.stdout, result.stderr[-2000:]
