"""Trains X(2+1)D with three space-time modules and compares them.

    python examples/train_video_classifier.py
    python examples/train_video_classifier.py --dataset fashion_mnist
    python examples/train_video_classifier.py --videos my_videos/ --fps 12
    python examples/train_video_classifier.py --csv my_videos.csv --fps 12

By default the clips are made here, from real images (scikit-learn's handwritten digits)
that move. An object either crosses the picture, or leaves, waits and comes back; the
labels are what the one or two objects of a clip do, several at once as in Charades.
To tell "right and back" from "left and back", a model must know which of two moves came
first, and they may lie half a clip apart.

`--videos` takes a folder with a subfolder of videos for each class, `--csv` a file with
the columns `path` and `labels` (see docs/video.md).

In `--output` you find the table's figures (metrics.json), what each token looks at
over time (attention_maps.png, after figure 8 of the paper), and the last module's
network for Keras (model.keras) and for any TensorFlow program (saved_model/).
"""

import argparse
import gzip
import json
import os
import shutil
import textwrap
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from tokenlearner_keras.data import (
    VideoFaults,
    evaluation_segments,
    read_video_csv,
    read_video_folder,
    training_clips,
)
from tokenlearner_keras.evaluation import evaluate_videos
from tokenlearner_keras.export import export_saved_model
from tokenlearner_keras.flops import count_flops
from tokenlearner_keras.models import X2Plus1DConfig, space_time_module, x2plus1d
from tokenlearner_keras.visualization import attention_figure, attention_maps

MODULES = ("conv2d+conv1d", "conv2d+temporal", "conv2d+token_learner")
# X3D-M's plan with half of the stages, most of the depth and of the width left out.
SMALL = X2Plus1DConfig(stem_filters=8, filters=(12, 32), depths=(1, 1), head_filters=96)
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
OBJECT = 8  # height and width of an object, in pixels
STEPS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
MOTIONS = [
    *(
        f"crosses to the {way}" if way in ("right", "left") else f"crosses {way}"
        for way in STEPS
    ),
    *(f"leaves {way} and comes back" for way in STEPS),
]


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset",
        choices=("digits", "fashion_mnist"),
        default="digits",
        help="images that move",
    )
    parser.add_argument("--videos", type=Path, help="folder of class folders")
    parser.add_argument("--csv", type=Path, help="CSV file of videos and labels")
    parser.add_argument("--fps", type=float, help="frames a second; default: as stored")
    parser.add_argument(
        "--modules", nargs="+", default=MODULES, help="modules of the last stage"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each module")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=0.006)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=32, help="height and width")
    parser.add_argument("--tokens", type=int, default=3, help="tokens of a frame")
    parser.add_argument(
        "--clips", type=int, default=1600, help="clips made for training"
    )
    parser.add_argument(
        "--test-clips", type=int, default=500, help="clips made for the evaluation"
    )
    parser.add_argument("--output", type=Path, default=Path("video_classifier"))
    return parser.parse_args(argv)


# --- Clips of moving images ---


def load_objects(dataset):
    """Images of training and test objects, `uint8`, 8 x 8."""
    if dataset == "digits":
        from sklearn.datasets import load_digits

        images = (load_digits().images * 255 / 16).astype("uint8")
        return images[:1300], images[1300:]
    parts = []
    for name in ("train", "t10k"):
        path = FASHION_MNIST / f"{name}-images-idx3-ubyte.gz"
        if not path.exists():
            raise SystemExit(
                f"{path} is not there: install the Debian package "
                "dataset-fashion-mnist, or leave --dataset at digits."
            )
        with gzip.open(path) as file:
            images = np.frombuffer(file.read(), "uint8", offset=16)
        parts.append(images.reshape(-1, 28, 28)[:, ::4, ::4])  # 7 x 7
    return [np.pad(images, ((0, 0), (0, 1), (0, 1))) for images in parts]


def make_path(motion, frames, size, rng):
    """Top left corner of an object in each frame, for one of `MOTIONS`."""
    step = np.array(list(STEPS.values())[motion % len(STEPS)])
    moving = int(rng.integers(frames // 4, frames // 3 + 1))
    speed = rng.uniform(0.5, 0.9) * (size - OBJECT) / moving
    steps = np.zeros((frames, 2))
    if motion < len(STEPS):
        start = rng.integers(0, frames - moving + 1)
        steps[start : start + moving] = speed * step
    else:
        wait = rng.integers(frames // 8, frames - 2 * moving + 1)
        start = rng.integers(0, frames - 2 * moving - wait + 1)
        back = start + moving + wait
        steps[start : start + moving] = speed * step
        steps[back : back + moving] = -speed * step
    path = np.cumsum(steps, axis=0)
    low, high = -path.min(axis=0), size - OBJECT - path.max(axis=0)
    return np.clip(np.rint(path + rng.uniform(low, high)), 0, size - OBJECT).astype(int)


def make_clips(objects, number, frames, size, seed):
    """Clips of one or two moving objects, and which motions are in each."""
    rng = np.random.default_rng(seed)
    clips = np.zeros((number, frames, size, size, 3), "uint8")
    labels = np.zeros((number, len(MOTIONS)), "float32")
    for clip, label in zip(clips, labels, strict=True):
        for motion in rng.choice(len(MOTIONS), rng.integers(1, 3), replace=False):
            label[motion] = 1
            picture = objects[rng.integers(len(objects)), :, :, None]
            path = make_path(motion, frames, size, rng)
            for frame, (top, left) in zip(clip, path, strict=True):
                window = frame[top : top + OBJECT, left : left + OBJECT]
                np.maximum(window, picture, out=window)
    return clips, labels


# --- Data: training clips, evaluation segments, class names, steps of an epoch ---


def make_moving_objects(arguments):
    import tensorflow as tf

    train_objects, test_objects = load_objects(arguments.dataset)
    shape = (arguments.frames, arguments.size)
    clips, labels = make_clips(train_objects, arguments.clips, *shape, seed=0)
    train = tf.data.Dataset.from_tensor_slices((clips, labels)).shuffle(len(clips))
    train = train.batch(arguments.batch_size, drop_remainder=True).prefetch(2)
    clips, labels = make_clips(test_objects, arguments.test_clips, *shape, seed=1)
    test = {"clips": clips, "labels": labels, "videos": np.arange(len(clips))}
    test = tf.data.Dataset.from_tensor_slices(test).batch(arguments.batch_size)
    return train, test, MOTIONS, arguments.clips // arguments.batch_size


def open_videos(arguments):
    faults = VideoFaults()
    if arguments.csv:
        records, names = read_video_csv(arguments.csv, arguments.videos, faults=faults)
    else:
        records, names = read_video_folder(arguments.videos)
    if len(records) < 2:
        raise SystemExit("Two videos at least are needed: to train and to evaluate.")
    # One video in five, of each class in turn, is kept for the evaluation.
    order = np.random.default_rng(0).permutation(len(records))
    order = sorted(order, key=lambda index: records[index].labels[:1])
    test_indices = set(order[::5])
    parts = {True: [], False: []}
    for index, record in enumerate(records):
        parts[index in test_indices].append(record)
    print(f"{len(parts[False])} videos to train on, {len(parts[True])} to evaluate")
    shared = {
        "num_classes": len(names),
        "clip_length": arguments.frames,
        "size": (arguments.size, arguments.size),
        "fps": arguments.fps,
        "faults": faults,
    }
    side = round(arguments.size * 8 / 7)  # the paper: 256 for crops of 224
    train = training_clips(
        parts[False], batch_size=arguments.batch_size, short_side=side, **shared
    )
    test = evaluation_segments(
        parts[True], batch_size=arguments.batch_size, short_side=side, **shared
    )
    return train, test, names, -(-len(parts[False]) // arguments.batch_size)


# --- Models ---


def build_model(module, arguments, num_classes):
    """The network, with the pixels' range inside, from `uint8` clips to logits."""
    shape = (arguments.frames, arguments.size, arguments.size, 3)
    network = x2plus1d(
        SMALL,
        shape,
        num_classes,
        temporal_module=module,
        num_tokens=arguments.tokens,
        num_heads=4,
        key_dim=8,
        depthwise=(True, False),
        dropout=0.1,
    )
    inputs = keras.Input(shape, name="clips")
    outputs = network(keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs))
    return keras.Model(inputs, outputs, name=module.replace("+", "_"))


def module_flops(module, arguments):
    """GFLOPs of one module of the last stage, as the paper's tables count."""
    side = -(-arguments.size // 2 ** (1 + len(SMALL.depths)))
    channels = int(SMALL.expansion * SMALL.filters[-1])
    shape = (arguments.frames, side, side, channels)
    bare = space_time_module(module, shape, arguments.tokens, num_heads=4, key_dim=8)
    return count_flops(bare, "tf_profiler").total / 1e9


class Clock(keras.callbacks.Callback):
    """Time of the training steps, without the first, which compiles."""

    def __init__(self):
        super().__init__()
        self.seconds, self.steps = 0.0, 0

    def on_train_batch_begin(self, batch, logs=None):
        self._start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        if self.steps > 0 or batch > 0:
            self.seconds += time.perf_counter() - self._start
            self.steps += 1


def compile_model(model, steps, arguments):
    warmup = max(1, min(50, steps // 5))
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        max(1, steps - warmup),
        warmup_target=arguments.learning_rate,
        warmup_steps=warmup,
    )
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=1e-4, global_clipnorm=1.0),
        keras.losses.BinaryCrossentropy(from_logits=True),
    )


def restart(model, fresh):
    """Gives a trained model the weights of a new one, and its optimizer a new start.

    The new model itself would have to be compiled once more for every seed.
    """
    for variable, start in zip(model.variables, fresh.variables, strict=True):
        variable.assign(start)
    for variable in model.optimizer.variables:  # AdamW's all start at zero
        variable.assign(keras.ops.zeros_like(variable))


def train_and_evaluate(model, data, arguments):
    train, test, names, _ = data
    clock = Clock()
    model.fit(train, epochs=arguments.epochs, verbose=0, callbacks=[clock])
    report = evaluate_videos(model, test, names)
    speed = clock.steps * arguments.batch_size / max(clock.seconds, 1e-9)
    return report, speed


# --- What is printed and written ---


def print_table(rows):
    header = (
        f"{'module':22} {'mAP (mean +- spread)':>22} {'parameters':>11} "
        f"{'GFLOPs module':>14} {'GFLOPs all':>11} {'clips/s':>8}"
    )
    print("\n" + header + "\n" + "-" * len(header))
    for row in rows:
        scores = f"{100 * row['map_mean']:.1f} +- {100 * row['map_std']:.1f}"
        print(
            f"{row['module']:22} {scores:>22} {row['parameters']:11,d} "
            f"{row['module_gflops']:14.4f} {row['gflops']:11.3f} "
            f"{row['clips_per_second']:8.1f}"
        )
    print(
        "mAP in percent: the mean and the standard deviation over the seeds. GFLOPs: 2 "
        "a multiply-add, one clip.\nclips/s: in training."
    )


def write_outputs(model, rows, data, arguments):
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows, indent=2)
    (arguments.output / "metrics.json").write_text(text + "\n")
    model.save(arguments.output / "model.keras")
    shutil.rmtree(arguments.output / "saved_model", ignore_errors=True)
    export_saved_model(
        model,
        arguments.output / "saved_model",
        class_names=data[2],
        output_activation="sigmoid",
    )
    if "token_learner" not in model.name:
        return
    batch = next(iter(data[1]))
    clips = np.asarray(batch["clips"])[:2]
    maps = attention_maps(model, clips)
    frames = np.linspace(0, arguments.frames - 1, 8).astype(int)
    titles = [
        "\n".join(
            textwrap.fill(name, 16)
            for name, on in zip(data[2], label, strict=True)
            if on
        )
        for label in np.asarray(batch["labels"])[:2]
    ]
    # Four of the tokens, as figure 8.
    tokens = range(min(4, arguments.tokens))
    figure = attention_figure(clips, maps, tokens, titles, frames=frames)
    figure.savefig(arguments.output / "attention_maps.png", dpi=80)


def main(argv=None):
    arguments = parse_arguments(argv)
    if arguments.videos or arguments.csv:
        data = open_videos(arguments)
    else:
        data = make_moving_objects(arguments)
    rows = []
    for module in arguments.modules:
        scores, speeds = [], []
        for seed in range(arguments.seeds):
            start = time.perf_counter()
            keras.utils.set_random_seed(seed)
            fresh = build_model(module, arguments, len(data[2]))
            if seed == 0:
                model = fresh
                compile_model(model, arguments.epochs * data[3], arguments)
            else:
                restart(model, fresh)
            report, speed = train_and_evaluate(model, data, arguments)
            scores.append(report.mean())
            speeds.append(speed)
            print(
                f"{module}, seed {seed}: mAP {100 * scores[-1]:.1f}, {speed:.1f} "
                f"clips/s, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
        rows.append(
            {
                "module": module,
                "map": scores,
                "map_mean": float(np.mean(scores)),
                "map_std": float(np.std(scores)),
                "parameters": model.count_params(),
                "module_gflops": module_flops(module, arguments),
                "gflops": count_flops(model, "tf_profiler").total / 1e9,
                "clips_per_second": float(np.mean(speeds)),
            }
        )
    print(f"\n{report}")
    print_table(rows)
    write_outputs(model, rows, data, arguments)
    print(f"Written to {arguments.output}/")
    return rows


if __name__ == "__main__":
    main()
