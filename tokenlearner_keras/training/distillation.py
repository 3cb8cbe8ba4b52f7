import math
from collections.abc import Sequence

import keras

from tokenlearner_keras.layers import TokenLearner
from tokenlearner_keras.layers._checks import check_choice, check_positive_int

TRAIN = ("all", "after", "token_learner")


def distill_token_learner(
    student: keras.Model,
    teacher: keras.Model,
    dataset,
    epochs: int = 1,
    train: str = "all",
    label_weight: float = 0.2,
    logit_weight: float = 1.0,
    feature_weight: float = 1.0,
    temperature: float = 2.0,
    feature_layers: tuple[str, str] | None = None,
    loss="auto",
    optimizer: keras.optimizers.Optimizer | None = None,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    steps_per_epoch: int | None = None,
    metrics: Sequence = (),
    **fit_arguments,
) -> keras.callbacks.History:
    """Trains a ViT with an inserted TokenLearner to answer as the ViT that it was.

    Recovers the accuracy that `insert_token_learner` costs, in few epochs: the student
    starts from the teacher's weights and learns from its logits and its features, by
    `keras.distillation.Distiller`. The loss is `label_weight` times the loss on the
    labels plus `1 - label_weight` times the weighted sum of

    - `logit_weight`: the Kullback-Leibler divergence of the softened class
      probabilities, and
    - `feature_weight`: the mean squared error of the features that the heads see.

    Args:
        student: The model with the TokenLearner, such as
            `insert_token_learner(teacher)`, with copied weights. Trained in place.
        teacher: The trained model. Its weights do not change.
        dataset: Batches of images and labels: anything that `fit` takes as `x`.
        epochs: int. Number of epochs.
        train: What is trained: `"all"`; `"token_learner"`, the TokenLearner alone; or
            `"after"`, it and all layers after it. The layers' `trainable` is as before
            afterwards.
        label_weight: float in [0, 1]. Weight of the labels; 0 does not look at them.
        logit_weight: float. Weight of the teacher's logits; 0 leaves them out.
        feature_weight: float. Weight of the teacher's features; 0 leaves them out.
        temperature: float. Temperature of the softened probabilities.
        feature_layers: Names of the teacher's and the student's layer whose outputs
            are compared. `None` takes what the last `Dense` layer sees, if that is the
            output of a layer of the same shape.
        loss: Loss on the labels. `"auto"` is categorical cross-entropy from logits, on
            integer labels.
        optimizer: Optimizer. `None` takes AdamW with the arguments below.
        learning_rate: float. Peak of the learning rate; it is warmed up over the first
            5 % of the steps and decays along a cosine to 0, where the number of steps
            is known, else constant.
        weight_decay: float. Weight decay of AdamW.
        steps_per_epoch: int or `None`. As in `fit`; the number of steps, where the
            data set does not know it.
        metrics: Metrics of the student's outputs.
        **fit_arguments: Passed to `fit`: `validation_data`, `callbacks`, `verbose`...

    Returns:
        The `keras.callbacks.History`, with `student_loss` and `distillation_loss`.

    Raises:
        ValueError: for an argument out of range, models that share weights, a student
            without TokenLearner (where `train` is not `"all"`), models that return
            probabilities, or features that cannot be found.

    Example:

    >>> student = insert_token_learner(teacher, 0.5, 8, token_learner="v11",
    ...                                regions_from=images[:64])
    >>> distill_token_learner(student, teacher, dataset, epochs=5)
    """
    check_positive_int("epochs", epochs)
    check_choice("train", train, TRAIN)
    weights = {
        "label_weight": label_weight,
        "logit_weight": logit_weight,
        "feature_weight": feature_weight,
    }
    for name, value in weights.items():
        if value < 0 or (name == "label_weight" and value > 1):
            expected = "in [0, 1]" if name == "label_weight" else "at least 0"
            raise ValueError(f"Argument `{name}` must be {expected}. Received: {value}")
    if label_weight < 1 and not logit_weight and not feature_weight:
        raise ValueError(
            "One of `logit_weight` and `feature_weight` must be above 0. "
            f"Received: {weights}"
        )
    if {id(w) for w in student.weights} & {id(w) for w in teacher.weights}:
        raise ValueError(
            "Arguments `student` and `teacher` must not share weights, or the teacher "
            "would change: insert the TokenLearner with `share_weights=False`."
        )
    for name, model in (("teacher", teacher), ("student", student)):
        activation = getattr(model.layers[-1], "activation", None)
        if logit_weight and activation is keras.activations.softmax:
            raise ValueError(
                f"Argument `{name}` must return logits for `logit_weight` above 0. "
                f"Received: a model whose last layer '{model.layers[-1].name}' has a "
                "softmax"
            )

    losses, factors = [], []
    if logit_weight:
        losses.append(_logits_distillation(temperature))
        factors.append(logit_weight)
    if feature_weight:
        if feature_layers is None:
            feature_layers = (_feature_layer(teacher), _feature_layer(student))
        losses.append(
            keras.distillation.FeatureDistillation(
                loss="mse",
                teacher_layer_name=feature_layers[0],
                student_layer_name=feature_layers[1],
            )
        )
        factors.append(feature_weight)
    if not losses:  # the labels alone
        losses, factors = [_logits_distillation(temperature)], [0.0]
    if loss == "auto":
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if optimizer is None:
        optimizer = _optimizer(
            dataset, epochs, steps_per_epoch, learning_rate, weight_decay
        )

    flags = [
        (layer, layer.trainable)
        for model in (student, teacher)
        for layer in model._flatten_layers()
    ]
    try:
        _freeze(student, train)
        distiller = keras.distillation.Distiller(
            teacher=teacher,
            student=student,
            distillation_losses=losses,
            distillation_loss_weights=factors,
            student_loss_weight=float(label_weight),
        )
        distiller.compile(optimizer=optimizer, loss=loss, metrics=list(metrics))
        history = distiller.fit(
            dataset, epochs=epochs, steps_per_epoch=steps_per_epoch, **fit_arguments
        )
    finally:
        for layer, trainable in flags:
            # Parents first: a parent's flag is set on all its children.
            layer.trainable = trainable
    return history


def _logits_distillation(temperature):
    # By its name Keras finds the function, not the class that it tests for, and then
    # compares the logits as if they were probabilities (seen in Keras 3.15).
    return keras.distillation.LogitsDistillation(
        temperature=temperature, loss=keras.losses.KLDivergence()
    )


def _feature_layer(model):
    """Name of the layer whose output the last layer, a head, sees."""
    head = model.layers[-1]
    source = head.input if isinstance(head, keras.layers.Dense) else None
    layer = getattr(source, "_keras_history", (None,))[0]
    if not isinstance(layer, keras.layers.Layer) or layer.output is not source:
        raise ValueError(
            "Cannot tell which features to compare: pass `feature_layers=(teacher's "
            f"layer, student's layer)`, or `feature_weight=0`. Model '{model.name}' "
            f"ends in layer '{head.name}' of type {type(head).__name__}"
        )
    return layer.name


def _optimizer(dataset, epochs, steps_per_epoch, learning_rate, weight_decay):
    steps = steps_per_epoch
    if steps is None:
        try:
            steps = len(dataset)
        except TypeError:  # a data set of unknown length
            steps = None
    if steps:
        total = steps * epochs
        warmup = math.ceil(0.05 * total)
        learning_rate = keras.optimizers.schedules.CosineDecay(
            0.0,
            max(total - warmup, 1),
            warmup_target=learning_rate,
            warmup_steps=warmup,
        )
    return keras.optimizers.AdamW(
        learning_rate, weight_decay=weight_decay, global_clipnorm=1.0
    )


def _freeze(model, train):
    if train == "all":
        return
    layers = model.layers
    found = [i for i, layer in enumerate(layers) if isinstance(layer, TokenLearner)]
    if not found:
        raise ValueError(
            f"Argument `student` must have a TokenLearner layer for train={train!r}. "
            f"Received: student={model!r} with layers {[x.name for x in layers]}"
        )
    for index, layer in enumerate(layers):
        is_learner = isinstance(layer, TokenLearner)
        layer.trainable = is_learner or (train == "after" and index > found[0])
