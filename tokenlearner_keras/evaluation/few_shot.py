"""Few-shot accuracy of frozen features by closed-form least squares (section 4.4)."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import keras
import numpy as np

CONVENTIONS = ("fixed", "sweep")
# Both published programs: an almost unregularised bias, and a guard of the deviation.
BIAS_CONSTANT = 100.0
DEVIATION_GUARD = 1e-5
FIXED_STRENGTHS = (2.0**10,)
SWEEP_STRENGTHS = tuple(2.0**i for i in range(-10, 20))
# Resize to 256, central crop of 224, pixels in [-1, 1].
RESIZE, CROP = 256, 224

# The nine data sets of section 4.4: TFDS name, few-shot split, evaluation split. The
# splits are those of the published configurations; data sets that only come as one
# split are cut.
FEW_SHOT_DATASETS = {
    "caltech101": ("caltech101", "train", "test"),
    "birds": ("caltech_birds2011", "train", "test"),
    "cars": ("cars196", "train", "test"),
    "cifar100": ("cifar100", "train", "test"),
    "colorectal_histology": (
        "colorectal_histology",
        "train[:2000]",
        "train[2000:]",
    ),
    "dtd": ("dtd", "train", "test"),
    "imagenet": ("imagenet2012", "train", "validation"),
    "pets": ("oxford_iiit_pet", "train", "test"),
    "uc_merced": ("uc_merced", "train[:1000]", "train[1000:]"),
}


@dataclasses.dataclass
class FewShotReport:
    """Few-shot accuracies of one model.

    Attributes:
        convention: `"fixed"` or `"sweep"`.
        rows: One dictionary for each result: `dataset`, `shots`, `seed` (`None` where
            nothing is shuffled), `strength` and `accuracy` (a fraction).
        strengths: For each number of shots the strength that is reported.
    """

    convention: str
    rows: list[dict]
    strengths: dict[int, float]

    def accuracies(self, dataset: str, shots: int) -> list[float]:
        """The accuracies of a data set at the reported strength, one for each seed."""
        return [
            row["accuracy"]
            for row in self.rows
            if row["dataset"] == dataset
            and row["shots"] == shots
            and row["strength"] == self.strengths[shots]
        ]

    @property
    def summary(self) -> dict[str, dict[int, dict[str, float]]]:
        """`mean` and `std` over the seeds by data set and shots, and of `"average"`.

        `"average"` is the mean over the data sets, as in figure 6 of the paper.
        """
        names = list(dict.fromkeys(row["dataset"] for row in self.rows))
        result = {}
        for name in names:
            result[name] = {}
            for shots in self.strengths:
                values = self.accuracies(name, shots)
                result[name][shots] = {
                    "mean": float(np.mean(values)),
                    "std": float(np.std(values)),
                }
        result["average"] = {}
        for shots in self.strengths:
            values = [self.accuracies(name, shots) for name in names]
            by_seed = np.mean(values, axis=0)
            result["average"][shots] = {
                "mean": float(by_seed.mean()),
                "std": float(by_seed.std()),
            }
        return result

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """Returns the report as JSON, and writes it to `path` if given."""
        text = json.dumps(
            {
                "convention": self.convention,
                "strengths": self.strengths,
                "summary": self.summary,
                "rows": self.rows,
            },
            indent=1,
        )
        if path is not None:
            _write(Path(path), lambda file: file.write(text.encode()))
        return text

    def __str__(self):
        summary = self.summary
        width = max(len(name) for name in summary)
        head = [f"{shots}-shot" for shots in self.strengths]
        lines = ["  ".join([" " * width, *(f"{text:>14}" for text in head)])]
        for name, by_shots in summary.items():
            cells = [
                f"{100 * cell['mean']:6.2f} ± {100 * cell['std']:4.2f}"
                for cell in by_shots.values()
            ]
            lines.append(
                "  ".join([name.ljust(width), *(f"{cell:>14}" for cell in cells)])
            )
        return "\n".join(lines)


def few_shot(
    model: keras.Model,
    datasets: Mapping[str, tuple] | Sequence[str],
    shots: Sequence[int] = (1, 5, 10),
    convention: str = "fixed",
    seeds: Sequence[int] = (0, 1, 2),
    strengths: Sequence[float] | None = None,
    layer: str | None = None,
    batch_size: int = 128,
    cache_dir: str | os.PathLike | None = None,
    data_dir: str | os.PathLike | None = None,
    strategy=None,
    verbose: int | str = 1,
) -> FewShotReport:
    """Evaluates frozen features by least squares on a few images of each class.

    The protocol of section 4.4 of [TokenLearner](https://arxiv.org/abs/2106.11297v1),
    which is ViT's: `shots` images of each class; their features, whitened channel by
    channel with the statistics of these few, and a constant channel; a linear map to
    targets of ±1 by ridge regression in closed form; the accuracy of its largest output
    on the test images. Two conventions are public:

    - `"fixed"` (big_vision): one strength, 2^10, and for each seed another random
      choice of images, mean and deviation over the seeds;
    - `"sweep"` (Scenic, nearer to the paper's time): the first images of each class;
      strengths 2^-10 ... 2^19; for each number of shots the one strength whose mean
      rank over all data sets is best. It is chosen on the test images, which is part
      of that protocol.

    Args:
        model: A functional model of images. Under a `tf.distribute` strategy the
            features are computed on all replicas.
        datasets: Names from `FEW_SHOT_DATASETS` (read with TFDS, from `data_dir`), or
            a dictionary from a name to `(train, test)`. Each is a pair of arrays
            `(images, labels)`, or a batched `tf.data.Dataset` of such pairs in a fixed
            order.
        shots: Numbers of training images of each class.
        convention: `"fixed"` or `"sweep"`.
        seeds: Seeds of the choices of images (`"fixed"`).
        strengths: Regularisation strengths; `None` takes the convention's. `"fixed"`
            takes exactly one.
        layer: Name of the layer whose output, `(batch, channels)` or `(batch, tokens,
            channels)` (then averaged over the tokens), is the feature. `None` takes
            what the last layer sees if that is `Dense` (a head), else the output.
        batch_size: int. Batch size of arrays and of TFDS data sets.
        cache_dir: Folder for computed features, or `None`. A file belongs to the
            model's weights, the name of the data set and its arrays; of a
            `tf.data.Dataset` only shapes and length are looked at.
        data_dir: Folder of TFDS.
        strategy: A `tf.distribute.Strategy` to compute the features on, or `None` for
            the one of the model. A model of another scope is copied.
        verbose: `verbose` of `keras.Model.predict`: 1 is a progress bar, 0 is silent.

    Returns:
        A `FewShotReport`: `print` it for a table; `to_json` writes it.

    Raises:
        ValueError: for an argument out of range, an unknown data set, or a class with
            fewer training images than `shots`.

    Example:

    >>> report = few_shot(model, {"digits": ((x, y), (x_test, y_test))})
    >>> print(report)
    """
    if convention not in CONVENTIONS:
        raise ValueError(
            f"Invalid value for argument `convention`. Expected one of {CONVENTIONS}. "
            f"Received: convention={convention!r}"
        )
    shots = _check_ints("shots", shots, 1)
    if strengths is None:
        strengths = FIXED_STRENGTHS if convention == "fixed" else SWEEP_STRENGTHS
    strengths = [float(strength) for strength in strengths]
    if not strengths or min(strengths) <= 0:
        raise ValueError(
            "Argument `strengths` must be positive numbers. "
            f"Received: strengths={strengths}"
        )
    if convention == "fixed":
        seeds = _check_ints("seeds", seeds, 0)
        if len(strengths) != 1:
            raise ValueError(
                "Argument `strengths` must be one number for the convention 'fixed'. "
                f"Received: strengths={strengths}"
            )
    else:
        seeds = [None]
    if not isinstance(datasets, Mapping):
        names = [datasets] if isinstance(datasets, str) else list(datasets)
        for name in names:
            if name not in FEW_SHOT_DATASETS:
                raise ValueError(
                    "Argument `datasets` must hold names of few-shot data sets, "
                    f"{tuple(FEW_SHOT_DATASETS)}, or be a dictionary of data. "
                    f"Received: {name!r}"
                )
        datasets = {name: None for name in names}

    extractor = feature_model(model, layer, strategy)
    digest = _weights_digest(extractor) if cache_dir is not None else None
    rows = []
    for name, data in datasets.items():
        if data is None:
            data = load_few_shot_dataset(name, batch_size, data_dir)
        features = [
            _features(
                extractor, part, split, name, batch_size, cache_dir, digest, verbose
            )
            for part, split in zip(data, ("train", "test"), strict=True)
        ]
        rows += _evaluate(name, *features, shots, seeds, strengths)
    chosen = {}
    for count in shots:
        chosen[count] = _best_strength(rows, count, strengths)
    return FewShotReport(convention, rows, chosen)


def ridge(x, y, strengths: Sequence[float]) -> np.ndarray:
    """Ridge regression without intercept, in closed form, for many strengths at once.

    Args:
        x: Array `(examples, features)`.
        y: Array `(examples, targets)`.
        strengths: Positive numbers: the factors of the squared norm of the weights.

    Returns:
        Array `(strengths, features, targets)`, float64.
    """
    x, y = np.asarray(x, "float64"), np.asarray(y, "float64")
    # One eigenvalue problem, the smaller one, serves all strengths.
    if len(x) >= x.shape[1]:
        values, vectors = np.linalg.eigh(x.T @ x)
        left, right = vectors, vectors.T @ (x.T @ y)
    else:
        values, vectors = np.linalg.eigh(x @ x.T)
        left, right = x.T @ vectors, vectors.T @ y
    values = np.maximum(values, 0)
    return np.stack([left @ (right / (values[:, None] + s)) for s in strengths])


def few_shot_predictions(
    x, y, x_test, num_classes: int, strengths: Sequence[float]
) -> np.ndarray:
    """The regression of the protocol on given features.

    Args:
        x: Array `(examples, features)`, features of the few training images.
        y: Integer array `(examples,)`, their labels.
        x_test: Array `(test_examples, features)`.
        num_classes: int. Number of classes.
        strengths: Positive numbers, the regularisation strengths.

    Returns:
        Array `(strengths, test_examples, num_classes)`: the regressed ±1 targets.
    """
    x, x_test = np.asarray(x, "float64"), np.asarray(x_test, "float64")
    mean, deviation = x.mean(0), x.std(0) + DEVIATION_GUARD

    def whiten(features):
        constant = np.full((len(features), 1), BIAS_CONSTANT)
        return np.concatenate([(features - mean) / deviation, constant], axis=1)

    targets = 2.0 * np.eye(num_classes)[np.asarray(y)] - 1.0
    return whiten(x_test) @ ridge(whiten(x), targets, strengths)


def feature_model(
    model: keras.Model, layer: str | None = None, strategy=None
) -> keras.Model:
    """The model from the inputs to the features that a linear head would see.

    Args:
        model: A functional model.
        layer: Name of a layer, whose output is the feature; see `few_shot`.
        strategy: A `tf.distribute.Strategy`, or `None`.

    Returns:
        A functional model with output `(batch, channels)`.
    """
    if strategy is not None and model.distribute_strategy is not strategy:
        with strategy.scope():
            copy = type(model).from_config(model.get_config())
            copy.set_weights(model.get_weights())
        model = copy
    if not isinstance(model, keras.Function):
        raise ValueError(
            "Argument `model` must be a functional Keras model. "
            f"Received: model={model!r}"
        )
    if layer is not None:
        output = model.get_layer(layer).output
    elif isinstance(model.layers[-1], keras.layers.Dense):
        output = model.layers[-1].input
    else:
        output = model.output
    if not isinstance(output, keras.KerasTensor) or len(output.shape) not in (2, 3):
        raise ValueError(
            "The features must be one tensor of shape (batch, channels) or (batch, "
            f"tokens, channels): pass `layer`. Received: {output} for layer={layer!r}"
        )

    def build():
        pooled = output
        if len(output.shape) == 3:
            pooled = keras.layers.GlobalAveragePooling1D(dtype="float32")(output)
        return keras.Model(model.inputs, pooled, name="features")

    with _scope(getattr(model, "distribute_strategy", None)):
        return build()


def _scope(strategy):
    """The scope of a `tf.distribute` strategy; other backends have none."""
    if keras.backend.backend() != "tensorflow" or strategy is None:
        return contextlib.nullcontext()
    return strategy.scope()


def _check_ints(name, values, lowest):
    values = list(values)
    if not values or any(
        isinstance(v, bool) or not isinstance(v, int) or v < lowest for v in values
    ):
        raise ValueError(
            f"Argument `{name}` must be integers of at least {lowest}. "
            f"Received: {name}={values}"
        )
    return values


def _evaluate(name, train, test, shots, seeds, strengths):
    """The rows of one data set."""
    (x, y), (x_test, y_test) = train, test
    num_classes = int(max(y.max(), y_test.max())) + 1
    members = [np.flatnonzero(y == label) for label in range(num_classes)]
    for label, indices in enumerate(members):
        if len(indices) < max(shots) and (y_test == label).any():
            raise ValueError(
                f"Argument `shots` must be at most the number of training images of "
                f"each class. Received: shots={shots} for class {label} of data set "
                f"'{name}', which has {len(indices)}"
            )
    rows = []
    for seed in seeds:
        if seed is None:
            order = members
        else:
            rng = np.random.default_rng(seed)
            order = [rng.permutation(indices) for indices in members]
        for count in shots:
            chosen = np.concatenate([indices[:count] for indices in order])
            predictions = few_shot_predictions(
                x[chosen], y[chosen], x_test, num_classes, strengths
            )
            for strength, scores in zip(strengths, predictions):
                accuracy = float(np.mean(scores.argmax(1) == y_test))
                rows.append(
                    {
                        "dataset": name,
                        "shots": count,
                        "seed": seed,
                        "strength": strength,
                        "accuracy": accuracy,
                    }
                )
    return rows


def _best_strength(rows, shots, strengths):
    """The strength whose rank, averaged over data sets, is highest."""
    accuracies = {}
    for row in rows:
        if row["shots"] == shots:
            accuracies.setdefault(row["dataset"], {})[row["strength"]] = row["accuracy"]
    ranks = [
        np.argsort(np.argsort([by_strength[s] for s in strengths], kind="stable"))
        for by_strength in accuracies.values()
    ]
    return strengths[int(np.argmax(np.mean(ranks, axis=0)))]


def _features(
    extractor, data, split, name, batch_size, cache_dir, digest, verbose
) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of one split, from the cache if they are there."""
    path = None
    if cache_dir is not None:
        key = hashlib.sha256(f"{digest}{_data_digest(data)}".encode()).hexdigest()
        path = Path(cache_dir) / f"{name}-{split}-{key[:24]}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as stored:
                return stored["features"], stored["labels"]
    if verbose:
        print(f"{name}, {split}:")
    if isinstance(data, (tuple, list)):
        images, labels = data
        if len(images) != len(labels):
            raise ValueError(
                "Images and labels must be equally many. "
                f"Received: {len(images)} images and {len(labels)} labels in the "
                f"{split} data of '{name}'"
            )
        features = extractor.predict(images, batch_size=batch_size, verbose=verbose)
        labels = np.asarray(labels)
    else:
        # One pass over the data: the labels go through the model as they are.
        target = keras.Input((), dtype="int64", name="labels")
        passed = keras.layers.Identity(dtype="int64")(target)
        with _scope(getattr(extractor, "distribute_strategy", None)):
            both = keras.Model(
                [extractor.inputs[0], target], [extractor.output, passed]
            )
        features, labels = both.predict(
            data.map(lambda images, labels: ((images, labels),)), verbose=verbose
        )
    labels = labels.reshape(-1).astype("int64")
    if not np.isfinite(features).all():
        raise ValueError(
            f"The features of data set '{name}' ({split}) must be finite. Received: "
            f"{np.sum(~np.isfinite(features))} numbers that are not"
        )
    features = np.asarray(features, "float32")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, lambda file: np.savez(file, features=features, labels=labels))
    return features, labels


def _write(path, write):
    """Writes beside and renames, so that no half-written file is left."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with open(partial, "wb") as file:
        write(file)
    os.replace(partial, path)


def _weights_digest(model):
    digest = hashlib.sha256(json.dumps(model.get_config(), default=str).encode())
    for weight in model.get_weights():
        digest.update(np.ascontiguousarray(weight).tobytes())
    return digest.hexdigest()


def _data_digest(data):
    if not isinstance(data, (tuple, list)):
        # Reading it all only to know it would be the work that the cache saves.
        return f"{data.element_spec}{int(data.cardinality())}"
    digest = hashlib.sha256()
    for array in data:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def load_few_shot_dataset(name: str, batch_size: int = 128, data_dir=None) -> tuple:
    """Reads a data set of section 4.4 with TFDS, in a fixed order.

    Args:
        name: A key of `FEW_SHOT_DATASETS`.
        batch_size: int. Batch size.
        data_dir: Folder of TFDS.

    Returns:
        The few-shot and the evaluation split: `tf.data.Dataset`s of batches of images,
        `(batch, 224, 224, 3)` in [-1, 1], and labels.
    """
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tfds_name, *splits = FEW_SHOT_DATASETS[name]
    builder = tfds.builder(tfds_name, data_dir=data_dir)

    def preprocess(example):
        image = tf.image.resize(tf.cast(example["image"], tf.float32), (RESIZE, RESIZE))
        image = tf.image.resize_with_crop_or_pad(image, CROP, CROP)
        if image.shape[-1] == 1:
            image = tf.image.grayscale_to_rgb(image)
        return image / 127.5 - 1.0, example["label"]

    read_config = tfds.ReadConfig(interleave_cycle_length=1)
    return tuple(
        builder.as_dataset(split=split, shuffle_files=False, read_config=read_config)
        .map(preprocess, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(batch_size)
        .prefetch(tf.data.AUTOTUNE)
        for split in splits
    )
