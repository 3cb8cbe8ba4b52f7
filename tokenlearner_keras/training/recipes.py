"""The papers' training settings as data, and the Keras parts made from them."""

import dataclasses
import math

import keras

from tokenlearner_keras.layers._checks import check_choice, check_positive_int

TASKS = ("multi_label", "single_label")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Training settings; nothing in it depends on how many replicas there are.

    The batch and the learning rate are those of one replica (a TPU core, a GPU), or of
    the whole run where `is_per_replica` is false.

    Attributes:
        name: What it is for.
        source: Where the figures are from.
        task: `"multi_label"` (sigmoid) or `"single_label"` (softmax).
        num_classes: Classes of the dataset.
        base_learning_rate: Learning rate at the start of the decay.
        batch_size: Examples in a step.
        is_per_replica: Whether both are of one replica.
        num_steps: Iterations.
        warmup_steps: Iterations of linear warm-up; they count in `num_steps`.
        momentum: Momentum of stochastic gradient descent.
        label_smoothing: Label smoothing of the loss.
        global_clipnorm: Largest norm of all gradients together, or `None`.
        replicas: How many replicas the source trained on, or `None` if it is not said.
        clip_length: Frames of a clip, for videos.
        train_size: Height and width in training.
        test_size: Height and width in evaluation.
        assumed: Names of the attributes that the source does not give; the value is
            the project's choice.
    """

    name: str
    source: str
    task: str
    num_classes: int
    base_learning_rate: float
    batch_size: int
    is_per_replica: bool
    num_steps: int
    warmup_steps: int = 0
    momentum: float = 0.9
    label_smoothing: float = 0.0
    global_clipnorm: float | None = None
    replicas: int | None = None
    clip_length: int | None = None
    train_size: tuple[int, int] | None = None
    test_size: tuple[int, int] | None = None
    assumed: tuple[str, ...] = ()

    def __post_init__(self):
        check_choice("task", self.task, TASKS)
        for name in ("num_classes", "batch_size", "num_steps"):
            check_positive_int(name, getattr(self, name))
        if not 0 <= self.warmup_steps < self.num_steps:
            raise ValueError(
                "Argument `warmup_steps` must be at least 0 and less than `num_steps`. "
                f"Received: warmup_steps={self.warmup_steps}, "
                f"num_steps={self.num_steps}"
            )


# Appendix A.2. The base rate is as printed: 0.8 per core for Charades, 0.025 for AViD.
CHARADES = Recipe(
    name="charades",
    source="TokenLearner v1, sections 5.1 and A.2",
    task="multi_label",
    num_classes=157,
    base_learning_rate=0.8,
    batch_size=4,
    is_per_replica=True,
    num_steps=100_000,
    replicas=64,
    clip_length=64,
    train_size=(224, 224),
    test_size=(256, 256),
    assumed=("momentum", "warmup_steps"),
)
AVID = Recipe(
    name="avid",
    source="TokenLearner v1, sections 5.1 and A.2",
    task="single_label",
    num_classes=887,
    base_learning_rate=0.025,
    batch_size=8,
    is_per_replica=True,
    num_steps=100_000,
    label_smoothing=0.2,
    clip_length=64,
    train_size=(224, 224),
    test_size=(256, 256),
    assumed=("momentum", "warmup_steps"),
)
# Appendix A.1: "the exact training protocols" of ViT; its published fine-tuning code.
VIT_FINE_TUNING = Recipe(
    name="vit_fine_tuning",
    source="vision_transformer, vit_jax/configs/common.py (ImageNet at 384)",
    task="single_label",
    num_classes=1000,
    base_learning_rate=0.03,
    batch_size=512,
    is_per_replica=False,
    num_steps=20_000,
    warmup_steps=500,
    global_clipnorm=1.0,
    train_size=(384, 384),
    test_size=(384, 384),
)
RECIPES = {recipe.name: recipe for recipe in (CHARADES, AVID, VIT_FINE_TUNING)}


def num_replicas() -> int:
    """Replicas of the current `tf.distribute` strategy, or data-parallel devices."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.distribute.get_strategy().num_replicas_in_sync
    distribution = keras.distribution.distribution()
    if isinstance(distribution, keras.distribution.DataParallel):
        return distribution.device_mesh.devices.size
    return 1


def global_batch_size(recipe: Recipe, replicas: int | None = None) -> int:
    """Examples in a step over all replicas.

    Args:
        recipe: The settings.
        replicas: Number of replicas. `None` takes the replicas at hand.

    Returns:
        The batch size to give to a dataset or to `fit`.

    Raises:
        ValueError: if a batch of the whole run does not divide by the replicas.
    """
    replicas = _replicas(replicas)
    if recipe.is_per_replica:
        return recipe.batch_size * replicas
    if recipe.batch_size % replicas:
        raise ValueError(
            f"The batch of recipe '{recipe.name}' must divide by the replicas. "
            f"Received: batch_size={recipe.batch_size}, replicas={replicas}"
        )
    return recipe.batch_size


def make_schedule(
    recipe: Recipe, replicas: int | None = None, num_steps: int | None = None
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Cosine decay to zero, with warm-up if the recipe has one.

    The gradient is a mean over all replicas, so that a rate per replica is multiplied
    by their number, as the batch is (the linear rule).

    Args:
        recipe: The settings.
        replicas: Number of replicas. `None` takes the replicas at hand.
        num_steps: Iterations, for a shorter run; warm-up shrinks with it.

    Returns:
        A Keras schedule.
    """
    rate = recipe.base_learning_rate
    if recipe.is_per_replica:
        rate *= _replicas(replicas)
    steps, warmup = recipe.num_steps, recipe.warmup_steps
    if num_steps is not None:
        check_positive_int("num_steps", num_steps)
        warmup = min(num_steps - 1, math.ceil(warmup * num_steps / steps))
        steps = num_steps
    if warmup == 0:
        return keras.optimizers.schedules.CosineDecay(rate, steps)
    return keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=rate, warmup_steps=warmup
    )


def make_optimizer(
    recipe: Recipe, replicas: int | None = None, num_steps: int | None = None
) -> keras.optimizers.Optimizer:
    """Stochastic gradient descent with momentum on the recipe's schedule.

    Args:
        recipe: The settings.
        replicas: Number of replicas. `None` takes the replicas at hand.
        num_steps: Iterations, for a shorter run.

    Returns:
        A Keras optimizer.
    """
    return keras.optimizers.SGD(
        make_schedule(recipe, replicas, num_steps),
        momentum=recipe.momentum,
        global_clipnorm=recipe.global_clipnorm,
    )


def make_loss(recipe: Recipe, from_logits: bool = False) -> keras.losses.Loss:
    """The recipe's loss.

    Args:
        recipe: The settings.
        from_logits: bool. Whether the model's outputs are logits.

    Returns:
        `BinaryCrossentropy` (targets: zeros and ones of shape `(batch, classes)`) or
        `CategoricalCrossentropy` (targets: one-hot vectors; label smoothing needs
        them).
    """
    if recipe.task == "multi_label":
        loss = keras.losses.BinaryCrossentropy
    else:
        loss = keras.losses.CategoricalCrossentropy
    return loss(from_logits=from_logits, label_smoothing=recipe.label_smoothing)


def _replicas(replicas):
    if replicas is None:
        return num_replicas()
    return check_positive_int("replicas", replicas)
