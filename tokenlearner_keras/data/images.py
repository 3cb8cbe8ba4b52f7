"""Labelled images as `tf.data` pipelines: splits, resizing, augmentation."""

import dataclasses
import difflib
import gzip
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np

SPLITS = ("train", "validation", "test")
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
# What `tf.io.decode_image` reads, by Pillow's names (MPO: a JPEG with a second image).
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "MPO", "PNG")
# Where Debian's package `dataset-fashion-mnist` puts its files.
FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Side of the images of a data set whose images differ in size.
DEFAULT_SIDE = 224


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """Labelled images in three splits that share no image.

    Attributes:
        name: The name under which it was loaded.
        splits: Dictionary from `"train"`, `"validation"` and `"test"` to an unbatched
            `tf.data.Dataset` of pairs `(image, label)`: uint8 of shape
            `(height, width, channels)`, and an int64 scalar.
        sizes: Dictionary from the split to its number of images.
        class_names: The name of each label.
        image_shape: `(height, width, channels)` that `batches` resizes to.
        mirrored: Whether an image that is flipped left to right keeps its class.
    """

    name: str
    splits: dict[str, Any]
    sizes: dict[str, int]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mirrored: bool = False

    def batches(
        self,
        split: str,
        batch_size: int,
        augmentation: keras.layers.Layer | None = None,
        value_range: tuple[float, float] = (-1.0, 1.0),
        seed: int = 0,
    ):
        """Returns batches of images and labels, ready for `fit` or `evaluate`.

        Args:
            split: `"train"` (shuffled, every batch of full size), `"validation"` or
                `"test"` (in order, every image once).
            batch_size: int. At most the number of images in the training split.
            augmentation: Layer that is called with `training=True` on every batch,
                such as `image_augmentation()`. `None` changes no image.
            value_range: What the pixel values 0 and 255 become.
            seed: int. Seed of the shuffling.

        Returns:
            A `tf.data.Dataset` of pairs: float32 of shape
            `(batch, height, width, channels)`, and int64 of shape `(batch,)`.
        """
        import tensorflow as tf

        if split not in SPLITS:
            raise ValueError(
                f"Argument `split` must be one of {SPLITS}. Received: split={split!r}"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int):
            raise ValueError(
                "Argument `batch_size` must be an integer of at least 1. "
                f"Received: batch_size={batch_size!r}"
            )
        is_training = split == "train"
        if batch_size < 1 or (is_training and batch_size > self.sizes["train"]):
            raise ValueError(
                "Argument `batch_size` must be at least 1 and at most the number of "
                f"training images, {self.sizes['train']}. "
                f"Received: batch_size={batch_size}"
            )
        height, width, _ = self.image_shape

        def preprocess(images, labels):
            return preprocess_images(images, (height, width), value_range), labels

        dataset = self.splits[split]
        if is_training:
            buffer_size = min(self.sizes["train"], 10_000)
            dataset = dataset.shuffle(buffer_size, seed=seed)
        # Images of one size are batched first: one call a batch is far cheaper.
        batch_first = dataset.element_spec[0].shape.is_fully_defined()
        if not batch_first:
            dataset = dataset.map(preprocess, num_parallel_calls=tf.data.AUTOTUNE)
        dataset = dataset.batch(batch_size, drop_remainder=is_training)
        if batch_first:
            dataset = dataset.map(preprocess, num_parallel_calls=tf.data.AUTOTUNE)
        if augmentation is not None:
            # One call at a time: the layer's seed moves on with every call, and the
            # order of the calls must not depend on the machine.
            dataset = dataset.map(
                lambda images, labels: (augmentation(images, training=True), labels)
            )
        return dataset.prefetch(tf.data.AUTOTUNE)


def load_image_dataset(
    name: str = "digits",
    image_size: int | tuple[int, int] | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    data_dir: str | Path | None = None,
    check_images: bool = True,
) -> ImageDataset:
    """Loads labelled images and divides them into train, validation and test.

    A split that the data set brings is kept; those that it lacks are cut from its
    training images, with the same share of every class, and equal images are always
    put into the same split.

    Args:
        name: One of

            - `"digits"`: 1797 handwritten digits, scanned, 8 x 8 grey values
              (scikit-learn's copy; nothing is downloaded).
            - `"fashion_mnist"`: 70000 pictures of clothes, 28 x 28 grey values, from
              the files of Debian's package `dataset-fashion-mnist` or, without them,
              from `keras.datasets`, which downloads them.
            - `"tfds:NAME"`: an image data set of TensorFlow Datasets, which downloads
              it at the first use. `NAME` may have a config and a version.
            - a folder with one folder of images for each class; or with the folders
              `train` and `test`, `validation` (or `val`), each with class folders.
        image_size: int or pair `(height, width)` that all images are resized to.
            `None` keeps the size of the data set, or takes 224 if it has no single
            size.
        validation_fraction: float. Share of the training images, or of all images
            where there is no split at all, for validation.
        test_fraction: float. Share of all images for the test, where there is no test
            split.
        seed: int. Seed of the division.
        data_dir: Folder of the Fashion-MNIST files, or TensorFlow Datasets' folder.
            `None` takes the usual one.
        check_images: bool. Whether each file of a folder is opened first, so that
            broken images are named at once and copies of an image are found. It reads
            every file.

    Returns:
        An `ImageDataset`.

    Raises:
        ValueError: for a name that is unknown, a folder without class folders, broken
            images, too few images of a class, or an image in two splits.
    """
    for argument, value in (
        ("validation_fraction", validation_fraction),
        ("test_fraction", test_fraction),
    ):
        if not 0 < value < 1:
            raise ValueError(
                f"Argument `{argument}` must be a number between 0 and 1. "
                f"Received: {argument}={value!r}"
            )
    if validation_fraction + test_fraction >= 1:
        raise ValueError(
            "Arguments `validation_fraction` and `test_fraction` must leave images for "
            f"the training. Received: validation_fraction={validation_fraction}, "
            f"test_fraction={test_fraction}"
        )
    image_size = _check_image_size(image_size)
    fractions = {"validation": validation_fraction, "test": test_fraction}
    name = str(name)
    if name == "digits":
        return _load_digits(image_size, fractions, seed)
    if name == "fashion_mnist":
        return _load_fashion_mnist(image_size, fractions, seed, data_dir)
    if name.startswith("tfds:"):
        return _load_tfds(name, image_size, fractions, data_dir)
    if Path(name).is_dir():
        return _load_folder(name, image_size, fractions, seed, check_images)
    choices = ("digits", "fashion_mnist")
    close = difflib.get_close_matches(name, choices, n=1)
    raise ValueError(
        "Argument `name` must be 'digits', 'fashion_mnist', 'tfds:NAME' (an image data "
        "set of TensorFlow Datasets) or an existing folder of class folders. "
        f"Received: name={name!r}" + (f". Did you mean {close[0]!r}?" if close else "")
    )


def preprocess_images(
    images, image_size: tuple[int, int], value_range: tuple[float, float] = (-1.0, 1.0)
):
    """Resizes images and maps their pixel values from [0, 255] to `value_range`.

    The training pipeline and the exported SavedModels share it.

    Args:
        images: Tensor of shape `(..., height, width, channels)` with at most one batch
            axis, of pixel values from 0 to 255.
        image_size: Pair `(height, width)`.
        value_range: What 0 and 255 become. Published ViT weights use (-1, 1).

    Returns:
        A float32 tensor. Images that have the size already are not resampled; others
        are resampled bilinearly, with a low-pass filter where they shrink.
    """
    import tensorflow as tf

    images = tf.cast(images, "float32")
    if tuple(images.shape[-3:-1]) != tuple(image_size):
        images = tf.image.resize(images, image_size, antialias=True)
    low, high = value_range
    return images * ((high - low) / 255.0) + low


def image_augmentation(
    translation: float = 0.1,
    rotation: float = 0.03,
    zoom: float = 0.1,
    horizontal_flip: bool = False,
    fill_value: float = -1.0,
    seed: int = 0,
) -> keras.Sequential:
    """Returns Keras's random translation, rotation, zoom and flip as one layer.

    Args:
        translation: float. Largest shift, as a share of the height and the width.
        rotation: float. Largest angle, as a share of a full turn.
        zoom: float. Largest zoom, in and out.
        horizontal_flip: bool. Whether to mirror half of the images. Leave it off where
            a mirrored image is another class or none: digits, letters, road signs.
        fill_value: Value of pixels from outside the image.
        seed: int. Seed of the random layers.

    Returns:
        A `keras.Sequential` for batches of shape `(batch, height, width, channels)`.
    """
    fill = {"fill_mode": "constant", "fill_value": fill_value}
    layers = []
    if horizontal_flip:
        layers.append(keras.layers.RandomFlip("horizontal", seed=seed))
    if rotation:
        layers.append(keras.layers.RandomRotation(rotation, seed=seed + 1, **fill))
    if translation:
        layers.append(
            keras.layers.RandomTranslation(
                translation, translation, seed=seed + 2, **fill
            )
        )
    if zoom:
        layers.append(keras.layers.RandomZoom((-zoom, zoom), seed=seed + 3, **fill))
    return keras.Sequential(layers, name="augmentation")


def _check_image_size(image_size):
    if image_size is None:
        return None
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    image_size = tuple(image_size)
    if len(image_size) != 2 or not all(
        isinstance(side, int) and side > 0 for side in image_size
    ):
        raise ValueError(
            "Argument `image_size` must be a positive integer or a pair (height, "
            f"width) of them. Received: image_size={image_size!r}"
        )
    return image_size


def _load_digits(image_size, fractions, seed):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images[..., np.newaxis] * (255 / 16)).astype("uint8")
    arrays = _cut(
        _hashes(images), digits.target, fractions, [str(c) for c in range(10)], seed
    )
    return _from_arrays(
        "digits",
        {s: (images[rows], digits.target[rows]) for s, rows in arrays.items()},
        tuple(str(c) for c in range(10)),
        image_size,
        mirrored=False,
    )


def _load_fashion_mnist(image_size, fractions, seed, data_dir):
    folder = Path(FASHION_MNIST_FOLDER if data_dir is None else data_dir)
    if data_dir is not None or folder.is_dir():
        train, test = (
            (
                _read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3),
                _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1),
            )
            for part in ("train", "t10k")
        )
    else:
        try:
            train, test = keras.datasets.fashion_mnist.load_data()
        except Exception as error:
            raise OSError(
                "Fashion-MNIST is neither on this machine nor could it be downloaded. "
                "On Debian and Ubuntu, `apt-get install dataset-fashion-mnist` puts it "
                f"into {FASHION_MNIST_FOLDER}. The download ended with: {error}"
            ) from error
    for images, labels in (train, test):
        if len(images) != len(labels):
            raise ValueError(
                "The Fashion-MNIST files do not fit each other: "
                f"{len(images)} images and {len(labels)} labels."
            )
    rows = _cut(
        _hashes(train[0]),
        train[1],
        {"validation": fractions["validation"]},
        FASHION_MNIST_CLASSES,
        seed,
    )
    arrays = {s: (train[0][r], train[1][r]) for s, r in rows.items()}
    arrays["test"] = test
    return _from_arrays(
        "fashion_mnist",
        {
            s: (images[..., np.newaxis], labels)
            for s, (images, labels) in arrays.items()
        },
        FASHION_MNIST_CLASSES,
        image_size,
        mirrored=True,
    )


def _read_idx(path, rank):
    """Reads a gzipped IDX file of unsigned bytes with `rank` axes."""
    if not path.is_file():
        raise ValueError(f"The Fashion-MNIST file {path} does not exist.")
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (EOFError, OSError) as error:
        raise ValueError(f"The file {path} is damaged: {error}") from error
    header = 4 + 4 * rank
    if content[:4] != bytes([0, 0, 8, rank]) or len(content) < header:
        raise ValueError(f"The file {path} is not an IDX file of {rank} axes of bytes.")
    shape = np.frombuffer(content, ">i4", rank, offset=4)
    if len(content) - header != np.prod(shape):
        raise ValueError(
            f"The file {path} is damaged: its header says {tuple(map(int, shape))}, "
            f"but {len(content) - header} values follow."
        )
    return np.frombuffer(content, "uint8", offset=header).reshape(shape)


def _load_tfds(name, image_size, fractions, data_dir):
    import tensorflow_datasets as tfds

    name = name.removeprefix("tfds:")
    base = re.split("[/:]", name)[0]
    known = tfds.list_builders(with_community_datasets=False)
    is_local = bool(base) and data_dir is not None and (Path(data_dir) / base).is_dir()
    if base not in known and not is_local:
        close = difflib.get_close_matches(base, known, n=5)
        raise ValueError(
            f"TensorFlow Datasets {tfds.__version__} has no data set {base!r} among "
            f"its {len(known)} (`tensorflow_datasets.list_builders()` lists them). "
            + (f"Near it: {', '.join(close)}. " if close else "")
            + f"Received: name='tfds:{name}'"
        )
    builder = tfds.builder(name, data_dir=data_dir)
    info = builder.info
    keys = info.supervised_keys
    features = [
        info.features[key] if isinstance(key, str) else None for key in keys or ()
    ]
    if [type(feature) for feature in features] != [
        tfds.features.Image,
        tfds.features.ClassLabel,
    ]:
        raise ValueError(
            f"The data set 'tfds:{name}' is not one of labelled images: its "
            f"`supervised_keys` are {keys}."
        )
    builder.download_and_prepare()
    available = {s: info.splits[s].num_examples for s in info.splits}
    if "train" not in available:
        raise ValueError(
            f"The data set 'tfds:{name}' has no split 'train'. It has: "
            f"{sorted(available)}"
        )
    plan = {s: (s, 0, available[s]) for s in SPLITS if s in available}
    if "test" in plan and _is_unlabelled(builder, "test"):
        del plan["test"]
    if "test" not in plan and "validation" in plan:
        plan["test"] = plan.pop("validation")
    # TensorFlow Datasets writes its files shuffled, so slices are random samples.
    _, start, stop = plan["train"]
    total = stop
    for split in ("test", "validation"):
        if split not in plan:
            count = max(1, round(total * fractions[split]))
            plan[split] = ("train", stop - count, stop)
            stop -= count
    if stop <= start:
        raise ValueError(
            f"The data set 'tfds:{name}' has too few images, {total}, for three splits."
        )
    plan["train"] = ("train", start, stop)

    def read(split, start, stop):
        instruction = tfds.core.ReadInstruction(split, from_=start, to=stop, unit="abs")
        return builder.as_dataset(
            split=instruction, as_supervised=True, shuffle_files=False
        )

    shape = features[0].shape
    return ImageDataset(
        name=f"tfds:{name}",
        splits={s: read(*plan[s]) for s in SPLITS},
        sizes={s: plan[s][2] - plan[s][1] for s in SPLITS},
        class_names=tuple(features[1].names),
        image_shape=(*(image_size or _native_size(shape)), shape[-1] or 3),
    )


def _native_size(shape):
    sides = tuple(shape[:2])
    return (DEFAULT_SIDE, DEFAULT_SIDE) if None in sides else sides


def _is_unlabelled(builder, split):
    """Whether the labels of a split are kept back (they are -1 then)."""
    _, label = next(iter(builder.as_dataset(split=split, as_supervised=True).take(1)))
    return int(label) < 0


def _load_folder(name, image_size, fractions, seed, check_images):
    import tensorflow as tf

    root = Path(name)
    folders = {path.name: path for path in _subfolders(root)}
    parts = {"train": root}
    if "train" in folders and _subfolders(folders["train"]):
        parts = {
            split: folders[folder]
            for folder, split in (
                ("train", "train"),
                ("val", "validation"),
                ("validation", "validation"),
                ("test", "test"),
            )
            if folder in folders
        }
    class_names = tuple(path.name for path in _subfolders(parts["train"]))
    if not class_names:
        raise ValueError(
            f"The folder {root} must contain one folder of images for each class. It "
            f"contains {len(list(root.iterdir()))} entries and no folder."
        )
    files, labels = {}, {}
    for split, folder in parts.items():
        found = tuple(path.name for path in _subfolders(folder))
        if found != class_names:
            raise ValueError(
                f"The folder {folder} must have the class folders of "
                f"{parts['train']}, {class_names}. It has {found}."
            )
        listed = [
            (path, label)
            for label, class_name in enumerate(class_names)
            for path in _image_files(folder / class_name)
        ]
        files[split] = np.array([str(path) for path, _ in listed])
        labels[split] = np.array([label for _, label in listed], "int64")
    hashes = {s: _file_hashes(paths, check_images) for s, paths in files.items()}
    _check_no_leak(files, hashes)

    missing = {s: f for s, f in fractions.items() if s not in parts}
    rows = _cut(hashes["train"], labels["train"], missing, class_names, seed)
    given_files, given_labels = files["train"], labels["train"]
    for split, index in rows.items():
        files[split], labels[split] = given_files[index], given_labels[index]

    def read(path, label):
        image = tf.io.decode_image(
            tf.io.read_file(path), channels=3, expand_animations=False
        )
        image.set_shape((None, None, 3))
        return image, label

    splits = {}
    for split in SPLITS:
        order = np.random.default_rng(seed).permutation(len(files[split]))
        # Shuffled once here: the files are in the order of their classes, and the
        # buffer that `batches` shuffles with may be smaller than the data set.
        splits[split] = tf.data.Dataset.from_tensor_slices(
            (files[split][order], labels[split][order])
        ).map(read, num_parallel_calls=tf.data.AUTOTUNE)
    return ImageDataset(
        name=root.name,
        splits=splits,
        sizes={s: len(files[s]) for s in SPLITS},
        class_names=class_names,
        image_shape=(*(image_size or (DEFAULT_SIDE, DEFAULT_SIDE)), 3),
    )


def _subfolders(folder):
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir() and not path.name.startswith(".")
    )


def _image_files(folder):
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    if not files:
        raise ValueError(
            f"The class folder {folder} contains no images "
            f"({', '.join(IMAGE_SUFFIXES)})."
        )
    return files


def _file_hashes(paths, check_images):
    """Returns a hash of each file's bytes; opens each image first if asked."""
    if not check_images:
        return np.array(paths)

    def examine(path):
        from PIL import Image

        try:
            with Image.open(path) as image:
                image_format = image.format
                image.load()
        except Exception as error:  # Pillow raises many kinds for broken files.
            return None, f"{path}: {error}"
        if image_format not in IMAGE_FORMATS:
            return None, f"{path}: a {image_format} file"
        return hashlib.sha256(Path(path).read_bytes()).hexdigest(), None

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(examine, paths))
    broken = [message for _, message in results if message]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(paths)} images cannot be read. The first are:\n  "
            + "\n  ".join(broken[:5])
        )
    return np.array([digest for digest, _ in results])


def _check_no_leak(files, hashes):
    seen = {}
    for split in files:
        for path, digest in zip(files[split], hashes[split], strict=True):
            other_split, other_path = seen.setdefault(digest, (split, path))
            if other_split != split:
                raise ValueError(
                    "The splits of a data set must not share images. "
                    f"Received the same image as {other_path} and as {path}"
                )


def _hashes(images):
    flat = np.ascontiguousarray(images).reshape(len(images), -1)
    return np.array([hashlib.sha256(row.tobytes()).hexdigest() for row in flat])


def _cut(hashes, labels, fractions, class_names, seed):
    """Divides row numbers into splits; rows with equal hashes stay together.

    Args:
        hashes: Array of strings, one a row.
        labels: Array of ints, one a row.
        fractions: Dictionary from a split to its share. The rest is for training.
        class_names: The name of each label, for the errors.
        seed: Seed of the division.
    """
    from sklearn.model_selection import train_test_split

    if not fractions:
        return {}
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    counts = np.bincount(labels[first], minlength=len(class_names))
    wanted = len(fractions) + 1
    if counts.min() < wanted:
        raise ValueError(
            f"Every class must have at least {wanted} different images, one for each "
            f"split that is cut. Class {class_names[int(counts.argmin())]!r} has "
            f"{counts.min()}."
        )
    parts = {"train": np.arange(len(first))}
    total = len(first)
    for split, fraction in fractions.items():
        rest = parts["train"]
        # At least one of each class on both sides.
        size = min(
            max(len(class_names), round(fraction * total)), len(rest) - len(class_names)
        )
        parts["train"], parts[split] = train_test_split(
            rest, test_size=size, stratify=labels[first][rest], random_state=seed
        )
    return {
        split: np.flatnonzero(np.isin(group, groups)) for split, groups in parts.items()
    }


def _from_arrays(name, arrays, class_names, image_size, mirrored):
    import tensorflow as tf

    shape = arrays["train"][0].shape[1:]
    return ImageDataset(
        name=name,
        splits={
            s: tf.data.Dataset.from_tensor_slices(
                (arrays[s][0], arrays[s][1].astype("int64"))
            )
            for s in SPLITS
        },
        sizes={s: len(arrays[s][0]) for s in SPLITS},
        class_names=tuple(class_names),
        image_shape=(*(image_size or shape[:2]), shape[-1]),
        mirrored=mirrored,
    )
