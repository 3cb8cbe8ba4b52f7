"""The runs of the command line: one configuration from which a run can be repeated."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import keras

from tokenlearner_keras.layers._checks import check_choice, check_positive_int
from tokenlearner_keras.training.checkpointing import train
from tokenlearner_keras.training.distributed import distributed
from tokenlearner_keras.training.pipeline import (
    DataWait,
    distribute_dataset,
    make_pipeline,
)
from tokenlearner_keras.training.recipes import (
    RECIPES,
    global_batch_size,
    make_loss,
    make_optimizer,
)
from tokenlearner_keras.training.strategies import STRATEGIES, get_strategy

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


@dataclasses.dataclass
class RunConfig:
    """Everything that a run depends on.

    Args:
        recipe: Name of the settings: `vit_fine_tuning`, `charades`, `avid`, or an
            example, `digits` or `fashion_mnist`.
        output: Folder of the results: configuration, checkpoints, history, model.
        strategy: `auto`, `cpu`, `one_device`, `mirrored`, `multi_worker` or `tpu`.
        tpu: Name of a TPU, for the strategies `auto` and `tpu`.
        precision: `float32`, `mixed_bfloat16` or `mixed_float16`.
        data: Name or folder of an image data set, as in `load_image_dataset`, or the
            folder of a prepared TFDS builder of videos.
        data_dir: Folder in which the data set lies, if not the usual one.
        model: `vit` or `x2plus1d`.
        variant: Variant of the model, or of the ViT `Ti/4` of the examples.
        num_tokens: Learned tokens of an image or a frame.
        image_size: Height and width. `null` takes that of the recipe or the data.
        weights: Published ViT weights (`.npz`) to begin with.
        num_steps: Steps in all. `null` takes the recipe's.
        batch_size: Examples in a step, over all devices. `null` takes the recipe's.
        learning_rate: Peak learning rate. `null` takes the recipe's.
        steps_per_epoch: Steps between validations, on the first examples of each
            shuffled pass. `null` is a whole pass over the data.
        steps_per_execution: Steps that the device runs at a time.
        jit_compile: Whether to use XLA. `null` does on accelerators.
        save_freq: Steps between checkpoints.
        seed: Seed of weights, order and augmentation.
    """

    recipe: str = "digits"
    output: str = "run"
    strategy: str = "auto"
    tpu: str | None = None
    precision: str = "float32"
    data: str = "digits"
    data_dir: str | None = None
    model: str = "vit"
    variant: str = "Ti/4"
    num_tokens: int = 8
    image_size: int | None = None
    weights: str | None = None
    num_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    steps_per_epoch: int | None = None
    steps_per_execution: int = 1
    jit_compile: bool | None = None
    save_freq: int = 500
    seed: int = 0


_SMALL = {"variant": "Ti/4", "batch_size": 64, "learning_rate": 1e-3}
RUNS: dict[str, dict[str, Any]] = {
    "digits": {
        **_SMALL,
        "data": "digits",
        "image_size": 16,
        "num_steps": 600,
        "save_freq": 100,
    },
    "fashion_mnist": {
        **_SMALL,
        "data": "fashion_mnist",
        "image_size": 28,
        "num_steps": 8000,
    },
    "vit_fine_tuning": {
        "data": "tfds:imagenet2012",
        "variant": "B/16",
        "precision": "mixed_bfloat16",
    },
    "charades": {
        "data": "charades",
        "model": "x2plus1d",
        "variant": "M",
        "precision": "mixed_bfloat16",
    },
    "avid": {
        "data": "avid",
        "model": "x2plus1d",
        "variant": "M",
        "precision": "mixed_bfloat16",
    },
}


def run_training(config: RunConfig) -> keras.callbacks.History:
    """Trains as `config` says; call it again, and it goes on where it was killed.

    Writes into `config.output`: `checkpoints/`, `history.json` and, at the end,
    `model.keras`.

    Args:
        config: The configuration.

    Returns:
        The history of the whole run.

    Raises:
        ValueError: for a value out of range, or devices or data that are not there.
    """
    check_choice("recipe", config.recipe, tuple(RUNS))
    check_choice("strategy", config.strategy, STRATEGIES)
    check_choice("precision", config.precision, PRECISIONS)
    check_choice("model", config.model, ("vit", "x2plus1d"))
    # Before anything else touches the devices.
    strategy = get_strategy(config.strategy, tpu=config.tpu)
    keras.utils.set_random_seed(config.seed)
    keras.config.set_dtype_policy(config.precision)
    replicas = strategy.num_replicas_in_sync
    recipe = RECIPES.get(config.recipe)
    batch_size = config.batch_size or global_batch_size(recipe, replicas)
    num_steps = config.num_steps or recipe.num_steps
    load = _videos if config.model == "x2plus1d" else _images
    make_dataset, validation, num_examples, num_classes, shape = load(
        config, recipe, batch_size, strategy
    )
    steps_per_epoch = config.steps_per_epoch or max(num_examples // batch_size, 1)
    steps_per_epoch = min(steps_per_epoch, num_steps)
    # An execution must not run into the next epoch.
    steps_per_epoch -= steps_per_epoch % config.steps_per_execution
    check_positive_int("steps_per_epoch", steps_per_epoch)

    with strategy.scope():
        model = distributed(_build(config, recipe, shape, num_classes))
        if config.weights:
            from tokenlearner_keras.checkpoints import load_vit_npz

            print(load_vit_npz(model, config.weights), flush=True)
        optimizer, loss = _optimizer_and_loss(config, recipe, replicas, num_steps)
        multi_label = recipe is not None and recipe.task == "multi_label"
        model.compile(
            optimizer,
            loss,
            metrics=[] if multi_label else ["accuracy"],
            jit_compile="auto" if config.jit_compile is None else config.jit_compile,
            steps_per_execution=config.steps_per_execution,
        )
    output = Path(config.output)
    wait = DataWait()
    history = train(
        model,
        make_dataset,
        epochs=-(-num_steps // steps_per_epoch),
        folder=output / "checkpoints",
        save_freq=config.save_freq,
        steps_per_epoch=steps_per_epoch,
        data_wait=wait,
        validation_data=validation and distribute_dataset(validation, strategy),
        verbose=2,
    )
    from tokenlearner_keras.training.pipeline import num_workers

    if num_workers(strategy)[1] == 0:
        write_text(output / "history.json", json.dumps(history.history, indent=1))
        part = output / "part.keras"
        model.save(part)
        os.replace(part, output / "model.keras")
    return history


def write_text(path: Path, text: str) -> None:
    """Writes a file beside `path` and renames it: no reader sees half of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def _build(config, recipe, shape, num_classes):
    from tokenlearner_keras import models

    if config.model == "x2plus1d":
        return models.x2plus1d(
            config.variant, shape, num_classes, num_tokens=config.num_tokens
        )
    variant = config.variant
    if variant == "Ti/4":  # of the examples: small images, small network
        variant = models.ViTConfig(
            patch_size=4, hidden_dim=64, num_layers=4, num_heads=4, mlp_dim=128
        )
    return models.vit(variant, shape, num_classes, num_tokens=config.num_tokens)


def _optimizer_and_loss(config, recipe, replicas, num_steps):
    if recipe is None:
        schedule = keras.optimizers.schedules.CosineDecay(
            0.0,
            max(num_steps - num_steps // 10, 1),
            warmup_target=config.learning_rate,
            warmup_steps=max(num_steps // 10, 1),
        )
        optimizer = keras.optimizers.AdamW(schedule, weight_decay=1e-4)
        return optimizer, keras.losses.CategoricalCrossentropy(from_logits=True)
    if config.learning_rate is not None:
        factor = replicas if recipe.is_per_replica else 1
        recipe = dataclasses.replace(
            recipe, base_learning_rate=config.learning_rate / factor
        )
    return (
        make_optimizer(recipe, replicas, num_steps),
        make_loss(recipe, from_logits=True),
    )


def _images(config, recipe, batch_size, strategy):
    import tensorflow as tf

    from tokenlearner_keras.data import load_image_dataset, preprocess_images

    size = config.image_size
    if size is None and recipe is not None:
        size = recipe.train_size
    images = load_image_dataset(
        config.data, image_size=size, seed=config.seed, data_dir=config.data_dir
    )
    height, width, channels = images.image_shape
    num_classes = len(images.class_names)

    def decode(image, label, seed):
        image = preprocess_images(image, (height, width))
        # Shifted by up to a tenth, at random.
        margin = max(min(height, width) // 10, 1)
        paddings = [[margin, margin], [margin, margin], [0, 0]]
        image = tf.pad(image, paddings, constant_values=-1.0)
        image = tf.image.stateless_random_crop(image, (height, width, channels), seed)
        if images.mirrored:
            image = tf.image.stateless_random_flip_left_right(image, seed + 1)
        return image, tf.one_hot(label, num_classes)

    def decode_plain(image, label):
        return preprocess_images(image, (height, width)), tf.one_hot(label, num_classes)

    def make_dataset(epoch):
        return make_pipeline(
            images.splits["train"],
            batch_size,
            decode,
            shuffle=min(images.sizes["train"], 10_000),
            seed=config.seed,
            epoch=epoch,
            strategy=strategy,
        )

    validation = make_pipeline(
        images.splits["validation"],
        batch_size,
        decode_plain,
        drop_remainder=False,
        strategy=strategy,
    )
    size = images.sizes["train"]
    return make_dataset, validation, size, num_classes, images.image_shape


def _videos(config, recipe, batch_size, strategy):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    from tokenlearner_keras.data import stored_training_clips

    folder = Path(config.data_dir or ".") / config.data
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:
        raise ValueError(
            "Argument `data` (below `data_dir`) must be the folder of a version of a "
            f"prepared TFDS builder of videos. Received: '{folder}' "
            f"({type(error).__name__}: {error})"
        ) from error
    size = config.image_size
    size = (size, size) if size else recipe.train_size

    def as_floats(clip, label):
        clip = tf.cast(clip, "float32") / 127.5 - 1.0
        if recipe.task == "single_label":
            label = tf.one_hot(label, recipe.num_classes)
        return clip, label

    def make_dataset(epoch):
        clips = stored_training_clips(
            builder,
            clip_length=recipe.clip_length,
            size=size,
            seed=epoch + config.seed * 1_000_003,
        )
        return make_pipeline(clips, batch_size, as_floats, strategy=strategy)

    shape = (recipe.clip_length, *size, 3)
    num_examples = builder.info.splits["train"].num_examples
    return make_dataset, None, num_examples, recipe.num_classes, shape
