"""Trains a plain ViT and the same ViT with learned tokens, and compares them.

    python examples/train_image_classifier.py
    python examples/train_image_classifier.py --dataset fashion_mnist
    python examples/train_image_classifier.py --dataset tfds:cifar10
    python examples/train_image_classifier.py --dataset my_photos/

The default data set, scikit-learn's handwritten digits, is installed with this package.
In `--output` you find the table's figures (metrics.json, history.csv), what each token
looks at (attention_maps.png), and the TokenLearner ViT for Keras (model.keras) and for
any TensorFlow program (saved_model/). Started again after a stop, the script goes
on where it was.
"""

import argparse
import csv
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import tokenlearner_keras as tlk
from tokenlearner_keras.data import image_augmentation, load_image_dataset
from tokenlearner_keras.export import export_saved_model
from tokenlearner_keras.flops import count_flops
from tokenlearner_keras.visualization import (
    AttentionMapsCallback,
    attention_figure,
    attention_maps,
)

# Black is 0, so that an empty patch starts as nothing but its position.
VALUE_RANGE = (0.0, 1.0)
# What suits the two small data sets; the rest gets `OTHER`.
DEFAULTS = {
    "digits": {
        # The scans have 8 x 8 pixels: a patch is one of them and the way to the next.
        "image_size": 32,
        "patch_size": 4,
        "num_layers": 3,
        "epochs": 28,
        "batch_size": 32,
        "learning_rate": 0.002,
    },
    "fashion_mnist": {
        "image_size": 28,
        "patch_size": 4,
        "num_layers": 4,
        "epochs": 3,
        "batch_size": 128,
        "learning_rate": 0.001,
    },
}
OTHER = {
    "image_size": None,
    "patch_size": None,
    "num_layers": 4,
    "epochs": 20,
    "batch_size": 64,
    "learning_rate": 0.001,
}
MODELS = {"vit": "ViT", "token_learner_vit": "TokenLearner ViT"}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset",
        default="digits",
        help="digits, fashion_mnist, tfds:NAME or a folder of class folders",
    )
    parser.add_argument("--data-dir", help="folder of the data set's files")
    parser.add_argument("--output", help="folder to write; runs/DATASET if not given")
    parser.add_argument("--overwrite", action="store_true", help="start afresh")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--image-size", type=int, help="side of the images in pixels")
    parser.add_argument("--patch-size", type=int, help="side of a patch in pixels")
    parser.add_argument("--hidden-dim", type=int, default=64)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--mlp-dim", type=int, default=128)
    parser.add_argument("--num-tokens", type=int, default=8)
    parser.add_argument("--tokenizer-location", type=float, default=0.5)
    parser.add_argument("--token-learner", default="v1", choices=("v1", "v10", "v11"))
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument(
        "--horizontal-flip",
        action=argparse.BooleanOptionalAction,
        help="mirror training images; only where a mirrored image keeps its class",
    )
    parser.add_argument(
        "--jit-compile", action=argparse.BooleanOptionalAction, default=True
    )
    arguments = parser.parse_args(argv)
    for name, value in DEFAULTS.get(arguments.dataset, OTHER).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.output is None:
        name = arguments.dataset.rstrip("/").replace(":", "_").split("/")[-1]
        arguments.output = f"runs/{name}"
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)
    output = Path(arguments.output)
    try:
        settings = prepare_output(output, arguments)
        dataset = load_image_dataset(
            arguments.dataset,
            image_size=arguments.image_size,
            seed=arguments.seed,
            data_dir=arguments.data_dir,
        )
        models = {name: build(name, dataset, arguments) for name in MODELS}
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{dataset.name}: {dataset.sizes['train']} images for training, "
        f"{dataset.sizes['validation']} for validation, {dataset.sizes['test']} for "
        f"the test; {len(dataset.class_names)} classes, {dataset.image_shape} pixels"
    )

    results = {
        name: train_and_measure(name, model, dataset, arguments, output / name)
        for name, model in models.items()
    }

    model = models["token_learner_vit"]
    write_beside(output / "model.keras", model.save)
    export_saved_model(
        model,
        output / "saved_model",
        preprocessing="uint8",
        value_range=VALUE_RANGE,
        class_names=dataset.class_names,
        overwrite=True,
    )
    draw_attention_maps(model, dataset, output / "attention_maps.png")
    write_history({name: output / name for name in MODELS}, output / "history.csv")
    metrics = {
        "settings": settings,
        "images": dataset.sizes,
        "class_names": dataset.class_names,
        "models": results,
        "versions": {"keras": keras.__version__, "tokenlearner_keras": tlk.__version__},
    }
    write_json(output / "metrics.json", metrics)
    print(f"\n{make_table(results)}\n")
    print(f"Written to {output}: model.keras, saved_model/, attention_maps.png,")
    print("history.csv, metrics.json")
    return metrics


def prepare_output(output, arguments):
    """Makes the folder, before anything slow; refuses one of other settings."""
    settings = {
        k: v for k, v in vars(arguments).items() if k not in ("output", "overwrite")
    }
    path = output / "settings.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            if arguments.overwrite:
                for name in MODELS:
                    shutil.rmtree(output / name, ignore_errors=True)
            elif json.loads(path.read_text()) != settings:
                raise ValueError(
                    f"the output folder {output} holds a run with other settings: "
                    "pass --overwrite to replace it, or another --output"
                )
        write_json(path, settings)
    except OSError as error:
        raise ValueError(
            f"the output folder {output} cannot be written: {error}"
        ) from error
    return settings


def build(name, dataset, arguments):
    """Builds one of the two models. They differ in the TokenLearner alone."""
    side = min(dataset.image_shape[:2])
    config = tlk.models.ViTConfig(
        patch_size=arguments.patch_size or (4 if side <= 64 else 16),
        hidden_dim=arguments.hidden_dim,
        num_layers=arguments.num_layers,
        num_heads=arguments.num_heads,
        mlp_dim=arguments.mlp_dim,
    )
    keras.utils.set_random_seed(arguments.seed)
    model = tlk.models.vit(
        config,
        input_shape=dataset.image_shape,
        num_classes=len(dataset.class_names),
        num_tokens=arguments.num_tokens if name == "token_learner_vit" else None,
        tokenizer_location=arguments.tokenizer_location,
        token_learner=arguments.token_learner,
        name=name,
    )
    # ViT starts its position embeddings near zero, which takes a long training to
    # outgrow. Here they start at the scale of the patches.
    (positions,) = model.get_layer("position_embedding").weights
    rng = np.random.default_rng(arguments.seed)
    positions.assign(0.3 * rng.standard_normal(positions.shape))
    return model


def train_and_measure(name, model, dataset, arguments, folder):
    """Trains a model, or takes up a finished one, and returns its line of the table."""
    result_path = folder / "result.json"
    compile_model(model, dataset, arguments)
    if result_path.is_file():
        print(f"\n{MODELS[name]}: trained already, taken from {folder}")
        model.load_weights(folder / "final.weights.h5")
        return json.loads(result_path.read_text())

    print(f"\n{MODELS[name]}: {model.count_params():,} parameters")
    train(model, dataset, arguments, folder)
    test = dataset.batches("test", arguments.batch_size, value_range=VALUE_RANGE)
    loss, accuracy = model.evaluate(test, verbose=0)
    result = {
        "parameters": model.count_params(),
        # As table 1 of the paper counts.
        "gflops": count_flops(model, convention="xla").total / 1e9,
        "images_per_second": measure_throughput(model, test),
        "test_accuracy": accuracy,
        "test_loss": loss,
    }
    write_beside(folder / "final.weights.h5", model.save_weights)
    write_json(result_path, result)
    shutil.rmtree(folder / "backup", ignore_errors=True)
    return result


def compile_model(model, dataset, arguments):
    batch_size = min(arguments.batch_size, dataset.sizes["train"])
    steps = dataset.sizes["train"] // batch_size * arguments.epochs
    warmup = min(steps // 10, 1000)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        max(steps - warmup, 1),
        warmup_target=arguments.learning_rate,
        warmup_steps=max(warmup, 1),
    )
    model.compile(
        keras.optimizers.AdamW(
            schedule, weight_decay=arguments.weight_decay, clipnorm=1.0
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=arguments.jit_compile,
    )


def train(model, dataset, arguments, folder):
    folder.mkdir(parents=True, exist_ok=True)
    flip = arguments.horizontal_flip
    augmentation = image_augmentation(
        translation=0.06,
        rotation=0.02,
        zoom=0.06,
        horizontal_flip=dataset.mirrored if flip is None else flip,
        fill_value=VALUE_RANGE[0],
        seed=arguments.seed,
    )
    batch_size = min(arguments.batch_size, dataset.sizes["train"])
    callbacks = [
        keras.callbacks.CSVLogger(folder / "log.csv", append=True),
        # The weights and the optimizer of the last two epochs: whatever moment the run
        # is stopped at, one of them is whole.
        keras.callbacks.BackupAndRestore(
            folder / "backup", double_checkpoint=True, delete_checkpoint=False
        ),
    ]
    if importlib.util.find_spec("tensorboard"):
        log_dir = folder / "tensorboard"
        callbacks.append(keras.callbacks.TensorBoard(log_dir, write_graph=False))
        if model.name == "token_learner_vit":
            images, _ = next(
                iter(dataset.batches("validation", 8, value_range=VALUE_RANGE))
            )
            callbacks.append(AttentionMapsCallback(log_dir, images, every=10))
    model.fit(
        dataset.batches(
            "train", batch_size, augmentation, VALUE_RANGE, seed=arguments.seed
        ),
        validation_data=dataset.batches(
            "validation", batch_size, value_range=VALUE_RANGE
        ),
        epochs=arguments.epochs,
        callbacks=callbacks,
        shuffle=False,  # The pipeline shuffles.
    )


def measure_throughput(model, batches, seconds=1.0):
    """Returns images per second of inference: the median over repeated batches."""
    import tensorflow as tf

    images, _ = next(iter(batches))
    infer = tf.function(lambda x: model(x, training=False), autograph=False)
    infer(images)
    times = []
    while sum(times) < seconds or len(times) < 5:
        start = time.perf_counter()
        infer(images).numpy()
        times.append(time.perf_counter() - start)
    return len(images) / float(np.median(times))


def draw_attention_maps(model, dataset, path, num_examples=6):
    """Draws what each token looks at, in test images of different classes."""
    examples = {}
    for images, labels in dataset.batches("test", 64, value_range=VALUE_RANGE):
        for image, label in zip(images.numpy(), labels.numpy(), strict=True):
            examples.setdefault(int(label), image)
        if len(examples) >= min(num_examples, len(dataset.class_names)):
            break
    labels = sorted(examples)[:num_examples]
    images = np.stack([examples[label] for label in labels])
    figure = attention_figure(
        images,
        attention_maps(model, images),
        titles=[dataset.class_names[label] for label in labels],
        value_range=VALUE_RANGE,
    )
    write_beside(path, lambda beside: figure.savefig(beside, dpi=120))


def write_history(folders, path):
    """Joins the two CSV logs; an epoch that was done again counts once."""
    rows = {}
    for name, folder in folders.items():
        with open(folder / "log.csv", newline="") as file:
            for row in csv.DictReader(file):
                rows[name, int(row["epoch"])] = {"model": name, **row}

    def write(beside):
        with open(beside, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(next(iter(rows.values()))))
            writer.writeheader()
            writer.writerows(rows[key] for key in rows)

    write_beside(path, write)


def make_table(results):
    lines = [
        "| model | parameters | GFLOPs | images/s | test accuracy |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        lines.append(
            f"| {MODELS[name]} | {result['parameters']:,} | {result['gflops']:.5f} "
            f"| {result['images_per_second']:,.0f} | {result['test_accuracy']:.2%} |"
        )
    return "\n".join(lines)


def write_json(path, content):
    write_beside(path, lambda beside: beside.write_text(json.dumps(content, indent=2)))


def write_beside(path, write):
    """Writes a file under another name and renames it: it is never half a file."""
    beside = path.with_name(f".new.{path.name}")
    write(beside)
    os.replace(beside, path)


if __name__ == "__main__":
    main()
