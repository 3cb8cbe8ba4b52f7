import gzip
import hashlib
from pathlib import Path

import keras
import numpy as np
import pytest

from tokenlearner_keras.data import (
    ImageDataset,
    image_augmentation,
    load_image_dataset,
    preprocess_images,
)
from tokenlearner_keras.data.images import FASHION_MNIST_FOLDER

pytestmark = pytest.mark.tensorflow


def arrays(dataset, split):
    """The images and labels of a split, as they are before any resizing."""
    pairs = [(x.numpy(), int(y)) for x, y in dataset.splits[split]]
    return [x for x, _ in pairs], np.array([y for _, y in pairs])


def digests(dataset, split):
    return {hashlib.sha256(x.tobytes()).digest() for x in arrays(dataset, split)[0]}


def assert_disjoint(dataset):
    train, validation, test = (
        digests(dataset, s) for s in ("train", "validation", "test")
    )
    assert train
    assert validation
    assert test
    assert not train & validation
    assert not train & test
    assert not validation & test


def write_image(path, seed=0, size=(12, 10), image_format=None):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype="uint8")
    Image.fromarray(values).save(path, format=image_format)


@pytest.fixture
def folder(tmp_path):
    """Two classes of 20 pictures, of two sizes and three formats."""
    for label, name in enumerate(("cat", "dog")):
        for index in range(20):
            suffix = (".png", ".jpg", ".bmp")[index % 3]
            write_image(
                tmp_path / "pets" / name / f"{index}{suffix}",
                seed=100 * label + index,
                size=(12, 10) if index % 2 else (9, 16),
            )
    return tmp_path / "pets"


def test_digits():
    dataset = load_image_dataset("digits")
    assert isinstance(dataset, ImageDataset)
    assert sum(dataset.sizes.values()) == 1797
    assert dataset.sizes == {"train": 1258, "validation": 180, "test": 359}
    assert dataset.image_shape == (8, 8, 1)
    assert dataset.class_names == tuple("0123456789")
    assert not dataset.mirrored
    images, labels = arrays(dataset, "test")
    assert images[0].dtype == np.uint8
    assert np.max(images) == 255
    # The same share of every class: 359 test images of 10 classes.
    assert set(np.bincount(labels)) <= {34, 35, 36, 37}
    assert_disjoint(dataset)


def test_seed_decides_the_division():
    first, same, other = (
        digests(load_image_dataset("digits", seed=seed), "test") for seed in (0, 0, 1)
    )
    assert first == same
    assert first != other


def test_fractions():
    dataset = load_image_dataset("digits", validation_fraction=0.2, test_fraction=0.3)
    assert dataset.sizes["validation"] == round(0.2 * 1797)
    assert dataset.sizes["test"] == round(0.3 * 1797)


def test_batches():
    dataset = load_image_dataset("digits", image_size=16)
    train = dataset.batches("train", 100)
    shapes = [tuple(x.shape) for x, _ in train]
    assert shapes == [(100, 16, 16, 1)] * 12
    images, labels = next(iter(train))
    assert images.dtype == "float32"
    assert labels.dtype == "int64"
    assert images.numpy().min() == -1
    assert 0.5 < images.numpy().max() <= 1
    # Every test image once, in order.
    seen = np.concatenate([y.numpy() for _, y in dataset.batches("test", 100)])
    np.testing.assert_array_equal(seen, arrays(dataset, "test")[1])
    # The training images come in a new order every time.
    first, second = ([y.numpy() for _, y in train] for _ in range(2))
    assert not np.array_equal(first, second)


def test_batches_keep_the_values_at_the_native_size():
    dataset = load_image_dataset("digits")
    images, _ = next(iter(dataset.batches("test", 50, value_range=(0.0, 1.0))))
    raw = np.stack(arrays(dataset, "test")[0][:50])
    np.testing.assert_allclose(images.numpy(), raw / 255, atol=1e-6)


def test_augmentation_changes_the_images_alone():
    dataset = load_image_dataset("digits", image_size=16)
    plain = dataset.batches("test", 64)
    augmented = dataset.batches("test", 64, augmentation=image_augmentation())
    (x, y), (x_new, y_new) = next(iter(plain)), next(iter(augmented))
    np.testing.assert_array_equal(y, y_new)
    assert x_new.shape == x.shape
    assert x_new.numpy().min() >= -1
    assert x_new.numpy().max() <= 1
    assert np.abs(x_new - x).mean() > 0.05
    # A second pass draws new transformations.
    assert np.abs(next(iter(augmented))[0] - x_new).mean() > 0.05


def test_augmentation_flips_only_when_asked():
    images = np.zeros((64, 4, 4, 1), "float32")
    images[:, :, :2] = 1.0
    still = {"translation": 0, "rotation": 0, "zoom": 0}
    same = image_augmentation(translation=0.1, rotation=0, zoom=0)
    assert not any(isinstance(x, keras.layers.RandomFlip) for x in same.layers)
    flipped = np.array(
        image_augmentation(**still, horizontal_flip=True)(images, training=True)
    )
    left = flipped[:, :, :2].mean(axis=(1, 2, 3))
    assert set(left) == {0.0, 1.0}
    assert image_augmentation(**still).layers == []


def test_preprocess_images():
    gray = np.full((2, 5, 7, 3), 51, "uint8")
    images = preprocess_images(gray, (4, 4), (0.0, 1.0)).numpy()
    assert images.shape == (2, 4, 4, 3)
    np.testing.assert_allclose(images, 0.2, atol=1e-6)
    # A checkerboard that shrinks averages: the low-pass filter.
    board = (255 * (np.indices((32, 32)).sum(0) % 2)).astype("uint8")[..., None]
    small = preprocess_images(board, (8, 8)).numpy()
    assert small.shape == (8, 8, 1)
    np.testing.assert_allclose(small[1:-1, 1:-1], 0.0, atol=0.05)


def write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim])
    header += np.array(values.shape, ">i4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(header + values.tobytes())


@pytest.fixture
def fashion_folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype="uint8")
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        labels = (np.arange(count) % 10).astype("uint8")
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    return tmp_path


def test_fashion_mnist_files(fashion_folder):
    dataset = load_image_dataset("fashion_mnist", data_dir=fashion_folder)
    # At least one validation image of each of the ten classes.
    assert dataset.sizes == {"train": 50, "validation": 10, "test": 20}
    assert dataset.image_shape == (28, 28, 1)
    assert dataset.class_names[-1] == "Ankle boot"
    assert dataset.mirrored
    images, labels = arrays(dataset, "test")
    np.testing.assert_array_equal(labels, np.arange(20) % 10)
    rng = np.random.default_rng(0)
    rng.integers(0, 256, (60, 28, 28), dtype="uint8")
    expected = rng.integers(0, 256, (20, 28, 28), dtype="uint8")
    np.testing.assert_array_equal(np.stack(images)[..., 0], expected)
    assert_disjoint(dataset)


@pytest.mark.skipif(
    not Path(FASHION_MNIST_FOLDER).is_dir(),
    reason="Debian's package dataset-fashion-mnist is not installed",
)
def test_fashion_mnist_of_debian():
    dataset = load_image_dataset("fashion_mnist")
    assert dataset.sizes == {"train": 54000, "validation": 6000, "test": 10000}
    labels = np.array([int(y) for _, y in dataset.splits["validation"]])
    assert set(np.bincount(labels)) == {600}
    # The first test picture is an ankle boot, the second a pullover.
    first = [int(y) for _, y in dataset.splits["test"].take(2)]
    assert [dataset.class_names[y] for y in first] == ["Ankle boot", "Pullover"]


def test_fashion_mnist_damaged_files(fashion_folder):
    path = fashion_folder / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"t10k-images.* is damaged"):
        load_image_dataset("fashion_mnist", data_dir=fashion_folder)
    content = gzip.decompress(whole)
    path.write_bytes(gzip.compress(content[:-5]))
    with pytest.raises(ValueError, match=r"says \(20, 28, 28\), but 15675 values"):
        load_image_dataset("fashion_mnist", data_dir=fashion_folder)
    path.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ValueError, match="is not an IDX file"):
        load_image_dataset("fashion_mnist", data_dir=fashion_folder)
    path.unlink()
    with pytest.raises(ValueError, match="does not exist"):
        load_image_dataset("fashion_mnist", data_dir=fashion_folder)


def test_folder(folder):
    dataset = load_image_dataset(folder, image_size=(8, 6))
    assert dataset.class_names == ("cat", "dog")
    assert dataset.sizes == {"train": 28, "validation": 4, "test": 8}
    assert dataset.image_shape == (8, 6, 3)
    assert_disjoint(dataset)
    labels = arrays(dataset, "test")[1]
    np.testing.assert_array_equal(np.bincount(labels), [4, 4])
    images, labels = next(iter(dataset.batches("train", 28)))
    assert images.shape == (28, 8, 6, 3)
    assert set(labels.numpy()) == {0, 1}
    assert load_image_dataset(folder).image_shape == (224, 224, 3)


def test_folder_keeps_copies_of_an_image_together(folder):
    # Eight copies of one picture: a division by file would spread them.
    original = (folder / "cat" / "0.png").read_bytes()
    for index in range(8):
        (folder / "cat" / f"copy{index}.png").write_bytes(original)
    for seed in range(5):
        dataset = load_image_dataset(folder, seed=seed)
        assert sum(dataset.sizes.values()) == 48
        assert_disjoint(dataset)


def test_folder_with_splits(folder, tmp_path):
    root = tmp_path / "divided"
    for split, seed in (("train", 0), ("test", 1000)):
        for label, name in enumerate(("cat", "dog")):
            for index in range(10):
                path = root / split / name / f"{index}.png"
                write_image(path, seed=seed + 100 * label + index)
    dataset = load_image_dataset(root)
    assert dataset.sizes == {"train": 18, "validation": 2, "test": 20}
    assert_disjoint(dataset)
    for index in range(3):
        write_image(root / "val" / "cat" / f"{index}.png", seed=2000 + index)
    with pytest.raises(ValueError, match=r"must have the class folders .*'cat', 'dog'"):
        load_image_dataset(root)
    write_image(root / "val" / "dog" / "0.png", seed=2003)
    dataset = load_image_dataset(root)
    assert dataset.sizes == {"train": 20, "validation": 4, "test": 20}
    leak = root / "test" / "dog" / "leak.png"
    leak.write_bytes((root / "train" / "dog" / "4.png").read_bytes())
    with pytest.raises(ValueError, match=r"must not share images.*4\.png and.*leak\."):
        load_image_dataset(root)


def test_folder_names_broken_images(folder):
    whole = (folder / "dog" / "1.jpg").read_bytes()
    (folder / "dog" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "cat" / "3.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"2 of 40 images cannot be read") as error:
        load_image_dataset(folder)
    assert str(folder / "dog" / "1.jpg") in str(error.value)
    assert str(folder / "cat" / "3.png") in str(error.value)
    (folder / "cat" / "3.png").unlink()
    (folder / "dog" / "1.jpg").unlink()
    write_image(folder / "dog" / "webp.png", image_format="WEBP")
    with pytest.raises(ValueError, match=r"webp\.png: a WEBP file"):
        load_image_dataset(folder)


def test_folder_without_class_folders(tmp_path):
    write_image(tmp_path / "flat" / "0.png")
    with pytest.raises(ValueError, match=r"one folder of images for each class.*1 en"):
        load_image_dataset(tmp_path / "flat")


def test_folder_with_an_empty_class(folder):
    (folder / "horse").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*horse contains no images"):
        load_image_dataset(folder)
    for index in range(2):
        write_image(folder / "horse" / f"{index}.png", seed=500 + index)
    with pytest.raises(ValueError, match=r"at least 3 different .* 'horse' has 2"):
        load_image_dataset(folder)


def make_tfds(data_dir, name, counts, feature="label"):
    """Writes a TensorFlow Datasets data set with random images of 6 x 6."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(shape=(6, 6, 3))}
            labels = (
                tfds.features.ClassLabel(names=["a", "b"])
                if feature == "label"
                else tfds.features.Text()
            )
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({**features, feature: labels}),
                supervised_keys=("image", feature),
            )

        def _split_generators(self, dl_manager):
            return {s: self._generate_examples(s) for s in counts}

        def _generate_examples(self, split):
            rng = np.random.default_rng(list(counts).index(split))
            for index in range(counts[split]):
                image = rng.integers(0, 256, (6, 6, 3), dtype="uint8")
                label = index % 2 if feature == "label" else "words"
                yield index, {"image": image, feature: label}

    Builder.name = name
    builder = Builder(data_dir=data_dir)
    builder.download_and_prepare()


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [
        ({"train": 40}, {"train": 28, "validation": 4, "test": 8}),
        ({"train": 40, "test": 10}, {"train": 36, "validation": 4, "test": 10}),
        ({"train": 40, "validation": 6}, {"train": 36, "validation": 4, "test": 6}),
        (
            {"train": 20, "validation": 6, "test": 4},
            {"train": 20, "validation": 6, "test": 4},
        ),
    ],
)
def test_tfds(counts, sizes, tmp_path):
    name = "local_" + "_".join(counts)
    make_tfds(tmp_path, name, counts)
    dataset = load_image_dataset(f"tfds:{name}", data_dir=tmp_path)
    assert dataset.sizes == sizes
    assert dataset.class_names == ("a", "b")
    assert dataset.image_shape == (6, 6, 3)
    for split, size in sizes.items():
        assert len(arrays(dataset, split)[1]) == size
    assert_disjoint(dataset)
    images, _ = next(iter(dataset.batches("train", 16)))
    assert images.shape == (16, 6, 6, 3)


def test_tfds_without_labels(tmp_path):
    make_tfds(tmp_path, "local_captions", {"train": 4}, feature="caption")
    with pytest.raises(ValueError, match=r"not one of labelled images.*'caption'"):
        load_image_dataset("tfds:local_captions", data_dir=tmp_path)


def test_unknown_names_list_the_choices():
    with pytest.raises(ValueError, match=r"Received: name='digts'. Did you mean 'dig"):
        load_image_dataset("digts")
    with pytest.raises(ValueError, match=r"'digits', 'fashion_mnist', 'tfds:NAME'"):
        load_image_dataset("no/such/folder")
    with pytest.raises(ValueError, match=r"no data set 'cifar11'.*Near it:.*cifar10"):
        load_image_dataset("tfds:cifar11")
    with pytest.raises(ValueError, match="no data set ''"):
        load_image_dataset("tfds:")
    # Known, but not images: refused before anything is downloaded.
    with pytest.raises(ValueError, match="not one of labelled images"):
        load_image_dataset("tfds:titanic")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation_fraction": 0}, "`validation_fraction` must be a number between"),
        ({"test_fraction": 1.5}, "`test_fraction` must be a number between"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "must leave images"),
        ({"image_size": 0}, "`image_size` must be a positive integer or a pair"),
        ({"image_size": (8, 8, 1)}, "`image_size` must be a positive integer or"),
    ],
)
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_image_dataset("digits", **arguments)


def test_invalid_batches():
    dataset = load_image_dataset("digits")
    with pytest.raises(ValueError, match="`split` must be one of"):
        dataset.batches("dev", 8)
    with pytest.raises(ValueError, match=r"at most the number of training images, 125"):
        dataset.batches("train", 2000)
    with pytest.raises(ValueError, match=r"batch_size=0"):
        dataset.batches("test", 0)
    with pytest.raises(ValueError, match=r"batch_size=2\.5"):
        dataset.batches("test", 2.5)
