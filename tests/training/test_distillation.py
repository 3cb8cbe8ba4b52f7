import re

import keras
import numpy as np
import pytest
from keras import ops

import tokenlearner_keras as tlk
from tests.contract import random_like, randomize_weights
from tokenlearner_keras.training import distill_token_learner


class Batches(keras.utils.PyDataset):
    def __init__(self, images, labels):
        super().__init__()
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images) // 16

    def __getitem__(self, index):
        rows = slice(16 * index, 16 * index + 16)
        return self.images[rows], self.labels[rows]


@pytest.fixture(scope="module")
def models():
    """A teacher whose answers depend on the images, and data labelled by it."""
    config = tlk.models.ViTConfig(
        patch_size=4, hidden_dim=16, num_layers=2, num_heads=2, mlp_dim=32
    )
    teacher = tlk.models.vit(config, input_shape=(16, 16, 1), num_classes=3)
    randomize_weights(teacher, scale=0.3)
    images = random_like((64, 16, 16, 1))
    labels = teacher.predict(images, verbose=0).argmax(1)
    return teacher, images, labels


def insert(teacher, **arguments):
    keras.utils.set_random_seed(1)
    return tlk.insert_token_learner(teacher, 0.5, 4, token_learner="v11", **arguments)


def distance(student, teacher, images):
    difference = student.predict(images, verbose=0) - teacher.predict(images, verbose=0)
    return float(np.mean(difference**2))


def values(layer):
    return [np.array(ops.convert_to_numpy(w)) for w in layer.weights]


@pytest.mark.parametrize(
    "train",
    [
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("all", "after")),
        "token_learner",
    ],
)
def test_student_comes_nearer(models, train):
    teacher, images, labels = models
    student = insert(teacher)
    before, start = values(teacher), distance(student, teacher, images)
    old = {layer.name: values(layer) for layer in student.layers}
    history = distill_token_learner(
        student,
        teacher,
        Batches(images, labels),
        epochs=6,
        train=train,
        # Hard labels would pull the logits past those of a teacher that is unsure.
        label_weight=0.0,
        learning_rate=1e-2,
        verbose=0,
    ).history
    assert distance(student, teacher, images) < 0.8 * start
    assert history["distillation_loss"][-1] < history["distillation_loss"][0]
    # The teacher is as it was; only what was asked for is trained.
    for a, b in zip(before, values(teacher)):
        assert np.array_equal(a, b)
    assert all(layer.trainable for layer in teacher._flatten_layers())
    assert all(layer.trainable for layer in student._flatten_layers())
    moved = {
        layer.name
        for layer in student.layers
        if any(not np.array_equal(a, b) for a, b in zip(old[layer.name], values(layer)))
    }
    expected = {"token_learner"}
    if train != "token_learner":
        expected |= {"block_1", "encoder_norm", "head"}
    if train == "all":
        expected |= {"patch_embedding", "position_embedding", "block_0"}
    assert moved == expected


@pytest.mark.slow
def test_student_answers_as_the_teacher_does_on_new_images(models):
    teacher, _, _ = models
    images, new = random_like((512, 16, 16, 1), 1), random_like((128, 16, 16, 1), 2)
    labels = teacher.predict(images, verbose=0).argmax(1)
    student = insert(teacher)
    distill_token_learner(
        student,
        teacher,
        Batches(images, labels),
        epochs=10,
        label_weight=0.0,
        learning_rate=1e-2,
        verbose=0,
    )
    # A student that gave every image the same answer could not get below this.
    spread = float(np.mean(teacher.predict(new, verbose=0).var(0)))
    assert distance(student, teacher, new) < 0.2 * spread, "only the mean was learned"


def losses_of(models, **arguments):
    teacher, images, labels = models
    student = insert(teacher)
    history = distill_token_learner(
        student,
        teacher,
        Batches(images[:16], labels[:16]),
        optimizer=keras.optimizers.SGD(0.0),
        verbose=0,
        **arguments,
    ).history
    return student, {name: value[0] for name, value in history.items()}


def test_the_loss_is_the_documented_sum(models):
    teacher, images, labels = models
    student, found = losses_of(
        models,
        label_weight=0.3,
        logit_weight=0.5,
        feature_weight=2.0,
        temperature=2.0,
        feature_layers=("pool", "pool"),
    )
    x, y = images[:16], labels[:16]
    t, s = (m.predict(x, verbose=0).astype("float64") for m in (teacher, student))

    def log_softmax(z):
        z = z - z.max(1, keepdims=True)
        return z - np.log(np.exp(z).sum(1, keepdims=True))

    label_loss = -np.mean(log_softmax(s)[np.arange(16), y])
    p, q = log_softmax(t / 2), log_softmax(s / 2)
    divergence = 4 * np.mean((np.exp(p) * (p - q)).sum(1))
    features = [
        keras.Model(m.inputs, m.get_layer("pool").output).predict(x, verbose=0)
        for m in (teacher, student)
    ]
    error = np.mean((features[0] - features[1]) ** 2)
    assert found["student_loss"] == pytest.approx(label_loss, rel=1e-4)
    distillation = 0.5 * divergence + 2.0 * error
    assert found["distillation_loss"] == pytest.approx(distillation, rel=1e-4)
    total = 0.3 * label_loss + 0.7 * distillation
    assert found["total_loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
def test_targets_can_be_left_out(models):
    _, both = losses_of(models)
    _, logits = losses_of(models, feature_weight=0)
    _, features = losses_of(models, logit_weight=0)
    _, labels = losses_of(models, label_weight=1.0, logit_weight=0, feature_weight=0)
    assert both["distillation_loss"] == pytest.approx(
        logits["distillation_loss"] + features["distillation_loss"], rel=1e-4
    )
    assert labels["total_loss"] == pytest.approx(labels["student_loss"], rel=1e-6)


@pytest.mark.slow
def test_learning_rate_is_warmed_up_and_decays(models):
    teacher, images, labels = models
    rates = []

    class Record(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            rates.append(float(self.model.optimizer.learning_rate))

    distill_token_learner(
        insert(teacher),
        teacher,
        Batches(images, labels),
        epochs=10,
        learning_rate=0.01,
        callbacks=[Record()],
        verbose=0,
    )
    assert len(rates) == 40
    assert rates[0] == 0
    assert rates[2] == pytest.approx(0.01)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(epochs=0), "`epochs` must be an integer of at least 1"),
        (dict(train="head"), "Invalid value for argument `train`"),
        (dict(label_weight=1.5), "`label_weight` must be in [0, 1]. Received: 1.5"),
        (dict(logit_weight=-1), "`logit_weight` must be at least 0"),
        (dict(logit_weight=0, feature_weight=0), "must be above 0"),
        (dict(feature_layers=("pool", "none")), "No such layer: none"),
    ],
)
def test_misuse(models, arguments, message):
    teacher, images, labels = models
    with pytest.raises(ValueError, match=re.escape(message)):
        distill_token_learner(
            insert(teacher), teacher, Batches(images, labels), **arguments
        )


def test_misuse_of_models(models):
    teacher, images, labels = models
    data = Batches(images, labels)
    with pytest.raises(ValueError, match="must not share weights"):
        distill_token_learner(insert(teacher, share_weights=True), teacher, data)
    plain = keras.models.clone_model(teacher)
    with pytest.raises(ValueError, match="`student` must have a TokenLearner layer"):
        distill_token_learner(plain, teacher, data, train="after")
    soft = keras.Model(
        teacher.inputs,
        keras.layers.Dense(3, activation="softmax", name="probabilities")(
            teacher.get_layer("pool").output
        ),
    )
    with pytest.raises(ValueError, match="`teacher` must return logits"):
        distill_token_learner(insert(teacher), soft, data)
    headless = keras.Model(teacher.inputs, teacher.get_layer("encoder_norm").output)
    with pytest.raises(ValueError, match="pass `feature_layers="):
        distill_token_learner(insert(teacher), headless, data, logit_weight=0)
