"""Makes a trained ViT about twice as fast, and shows what that costs.

    python examples/make_vit_faster.py
    python examples/make_vit_faster.py --quick
    python examples/make_vit_faster.py --report

Trains a ViT on Fashion-MNIST (the teacher), inserts a TokenLearner with 8 tokens in
its middle, and recovers the accuracy by distillation for 1, 2 and 5 epochs. Beside
these: the inserted TokenLearner before any training, started as spread regions and at
random; the same model trained from scratch; and the few-shot accuracy of the frozen
features.

In `--output` you find results.json, the table (table.md) and accuracy.png. Every stage
is saved: started again after a stop, the script goes on with the first one that is
missing. `--report` only writes the table and the plot, and fills in FLOPs if they were
counted nowhere yet (that needs TensorFlow; all else runs on any Keras backend).
"""

import argparse
import gzip
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import tokenlearner_keras as tlk
from tokenlearner_keras.evaluation import few_shot
from tokenlearner_keras.training import distill_token_learner

FULL = {
    "hidden_dim": 128,
    "num_layers": 6,
    "num_heads": 4,
    "mlp_dim": 256,
    "train_images": 60_000,
    "test_images": 10_000,
    "teacher_epochs": 25,
    "recovery_epochs": (1, 2, 5),
    "batch_size": 256,
}
QUICK = {
    **FULL,
    "hidden_dim": 32,
    "num_layers": 4,
    "num_heads": 2,
    "mlp_dim": 64,
    "train_images": 4_000,
    "test_images": 1_000,
    "teacher_epochs": 5,
    "recovery_epochs": (1,),
    "batch_size": 128,
}
PATCH_SIZE, NUM_TOKENS, LOCATION = 4, 8, 0.5


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="runs/make_vit_faster")
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--quick", action="store_true", help="one seed, few images")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--token-learner", default="v11", choices=("v1", "v10", "v11"))
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--data-dir",
        default="/usr/share/datasets/fashion-mnist",
        help="folder of the four IDX files; if it is not there, Keras downloads them",
    )
    arguments = parser.parse_args(argv)
    if arguments.seeds is None:
        arguments.seeds = [0] if arguments.quick else [0, 1, 2]
    return arguments


def load_fashion_mnist(folder):
    """Images in [-1, 1], (examples, 28, 28, 1), and labels, for training and test."""
    folder = Path(folder)
    if folder.is_dir():

        def read(name, offset):
            with gzip.open(folder / name) as file:
                return np.frombuffer(file.read(), "uint8", offset=offset)

        arrays = [
            (
                read(f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28),
                read(f"{part}-labels-idx1-ubyte.gz", 8),
            )
            for part in ("train", "t10k")
        ]
    else:
        arrays = keras.datasets.fashion_mnist.load_data()
    return [
        (images[..., None].astype("float32") / 127.5 - 1, labels.astype("int32"))
        for images, labels in arrays
    ]


def load_digits():
    """scikit-learn's digits in the teacher's size, half for training; or `None`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return None
    digits = load_digits()
    images = digits.images[..., None].astype("float32") / 8 - 1
    images = np.asarray(
        keras.ops.convert_to_numpy(keras.ops.image.resize(images, (28, 28)))
    )
    half = len(images) // 2
    return (images[:half], digits.target[:half]), (images[half:], digits.target[half:])


class Batches(keras.utils.PyDataset):
    """Shuffled batches; images shifted by up to 2 pixels and half of them mirrored."""

    def __init__(self, images, labels, batch_size, seed):
        super().__init__()
        self.images = np.pad(
            images, [(0, 0), (2, 2), (2, 2), (0, 0)], constant_values=-1
        )
        self.labels, self.batch_size = labels, batch_size
        self.seed, self.epoch = seed, 0
        self.on_epoch_end()

    def __len__(self):
        return len(self.images) // self.batch_size

    def on_epoch_end(self):
        self.order = np.random.default_rng([self.seed, self.epoch]).permutation(
            len(self.images)
        )
        self.epoch += 1

    def __getitem__(self, index):
        rows = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        rng = np.random.default_rng([self.seed, self.epoch, index])
        y, x = rng.integers(0, 5, (2, len(rows), 1))
        images = self.images[
            rows[:, None, None],
            (y + np.arange(28))[:, :, None],
            (x + np.arange(28))[:, None],
        ]
        mirror = rng.random(len(rows)) < 0.5
        images[mirror] = images[mirror, :, ::-1]
        return images, self.labels[rows]


def make_vit(settings, num_tokens=None, token_learner="v11"):
    config = tlk.models.ViTConfig(
        PATCH_SIZE,
        settings["hidden_dim"],
        settings["num_layers"],
        settings["num_heads"],
        settings["mlp_dim"],
    )
    return tlk.models.vit(
        config,
        input_shape=(28, 28, 1),
        num_classes=10,
        num_tokens=num_tokens,
        tokenizer_location=LOCATION,
        token_learner=token_learner,
        dropout=0.0,
    )


def train(model, data, settings, epochs, learning_rate, seed, backup):
    """Trains on the labels; a run that is stopped goes on from its last epoch."""
    batches = Batches(*data, settings["batch_size"], seed)
    steps = epochs * len(batches)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        steps - steps // 20,
        warmup_target=learning_rate,
        warmup_steps=steps // 20,
    )
    model.compile(
        keras.optimizers.AdamW(schedule, weight_decay=0.05, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(
        batches,
        epochs=epochs,
        verbose=2,
        callbacks=[keras.callbacks.BackupAndRestore(str(backup))],
    )


def accuracy(model, data):
    images, labels = data
    scores = model.predict(images, batch_size=500, verbose=0)
    return float(np.mean(scores.argmax(1) == labels))


def images_per_second(models, images, batch_size=500, rounds=5):
    """Medians of `predict`, after a first call each; the models take turns."""
    seconds = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model.predict(images, batch_size=batch_size, verbose=0)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: len(images) / statistics.median(values)
        for name, values in seconds.items()
    }


def count_flops(settings, token_learner):
    """Multiply-adds of one image, or `None` on a machine that cannot count them."""
    try:
        return {
            "teacher": tlk.count_flops(make_vit(settings)).total,
            "token_learner": tlk.count_flops(
                make_vit(settings, NUM_TOKENS, token_learner)
            ).total,
        }
    except (ImportError, AttributeError, ValueError) as error:
        print(f"FLOPs are not counted here: {error}")
        return None


class Results:
    """Results by stage, written after every stage."""

    def __init__(self, path, header):
        self.path = path
        self.values = {"header": header, "stages": {}}
        if path.exists():
            self.values = json.loads(path.read_text())
            old = self.values["header"]
            for key in ("settings", "token_learner", "learning_rate"):
                if old[key] != json.loads(json.dumps(header[key])):
                    raise SystemExit(
                        f"{path} has results of another {key}: {old[key]} instead of "
                        f"{header[key]}. Choose another --output."
                    )

    def stage(self, name, run):
        """The stored result of a stage, or that of running it now."""
        if name not in self.values["stages"]:
            start = time.perf_counter()
            result = run()
            self.values["stages"][name] = {
                "result": result,
                "seconds": round(time.perf_counter() - start, 1),
                "backend": keras.backend.backend(),
            }
            self.write()
            print(f"{name}: {result}", flush=True)
        return self.values["stages"][name]["result"]

    def write(self):
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.values, indent=1))
        os.replace(partial, self.path)


def run_seed(seed, arguments, settings, data, results, output):
    train_data, test_data = data
    folder = output / f"seed{seed}"
    folder.mkdir(exist_ok=True)
    name = f"seed{seed}"
    rate = arguments.learning_rate

    def load(path):
        return keras.saving.load_model(folder / path, compile=False)

    def save(model, path):
        partial = folder / f"partial_{path}"
        model.save(partial)
        os.replace(partial, folder / path)

    def train_teacher():
        keras.utils.set_random_seed(seed)
        model = make_vit(settings)
        train(
            model,
            train_data,
            settings,
            settings["teacher_epochs"],
            rate,
            seed,
            folder / "backup_teacher",
        )
        save(model, "teacher.keras")
        return accuracy(model, test_data)

    results.stage(f"{name}/teacher", train_teacher)
    teacher = load("teacher.keras")

    def insert(start):
        keras.utils.set_random_seed(seed)
        return tlk.insert_token_learner(
            teacher,
            LOCATION,
            NUM_TOKENS,
            token_learner=arguments.token_learner,
            regions_from=train_data[0][:256] if start == "regions" else None,
        )

    for start in ("random", "regions"):
        results.stage(
            f"{name}/{start}/0",
            lambda start=start: accuracy(insert(start), test_data),
        )

    def recover(start, epochs, path=None):
        student = insert(start)
        distill_token_learner(
            student,
            teacher,
            Batches(*train_data, settings["batch_size"], 1000 + seed),
            epochs=epochs,
            learning_rate=rate,
            verbose=2,
        )
        if path is not None:
            save(student, path)
        return accuracy(student, test_data)

    last = max(settings["recovery_epochs"])
    for epochs in settings["recovery_epochs"]:
        results.stage(
            f"{name}/regions/{epochs}",
            lambda epochs=epochs: recover(
                "regions", epochs, "token_learner.keras" if epochs == last else None
            ),
        )
    results.stage(f"{name}/random/{last}", lambda: recover("random", last))

    def from_scratch():
        keras.utils.set_random_seed(seed)
        model = make_vit(settings, NUM_TOKENS, arguments.token_learner)
        train(
            model,
            train_data,
            settings,
            settings["teacher_epochs"],
            rate,
            seed,
            folder / "backup_scratch",
        )
        return accuracy(model, test_data)

    results.stage(f"{name}/scratch/{settings['teacher_epochs']}", from_scratch)
    student = load("token_learner.keras")
    results.stage(
        f"{name}/images_per_second",
        lambda: images_per_second(
            {"teacher": teacher, "token_learner": student}, test_data[0]
        ),
    )

    digits = load_digits()
    sets = {"fashion_mnist": data, **({"digits": digits} if digits else {})}
    for which, model in (("teacher", teacher), ("token_learner", student)):
        results.stage(
            f"{name}/few_shot/{which}",
            lambda model=model: (
                few_shot(
                    model,
                    sets,
                    shots=(1, 5, 10),
                    cache_dir=output / "features",
                    verbose=0,
                ).summary
            ),
        )


def mean_and_spread(values):
    return float(np.mean(values)), float(np.std(values))


def report(results, settings, token_learner, output):
    """Writes the table, the summary in results.json and, with Matplotlib, the plot."""
    stages = results.values["stages"]
    if results.values.get("flops") is None:
        results.values["flops"] = count_flops(settings, token_learner)
    flops = results.values["flops"]
    by_row, speeds, few = {}, {}, {}
    for name, stage in stages.items():
        _, what, *rest = name.split("/")
        if what == "images_per_second":
            for model, value in stage["result"].items():
                speeds.setdefault(model, []).append(value)
        elif what == "few_shot":
            for dataset, by_shots in stage["result"].items():
                for shots, cell in by_shots.items():
                    key = (dataset, int(shots))
                    few.setdefault(key, {}).setdefault(rest[0], []).append(cell["mean"])
        else:
            epochs = int(rest[0]) if rest else settings["teacher_epochs"]
            by_row.setdefault((what, epochs), []).append(stage["result"])
    if not by_row:
        raise SystemExit("There are no results yet: run without --report first.")
    teacher_epochs = settings["teacher_epochs"]
    labels = {
        "teacher": "ViT (teacher)",
        "random": "inserted, random start",
        "regions": "inserted, start as regions",
        "scratch": "TokenLearner ViT from scratch",
    }
    order = list(labels)
    rows, summary = [], {}
    for (what, epochs), values in sorted(
        by_row.items(), key=lambda item: (order.index(item[0][0]), item[0][1])
    ):
        mean, spread = mean_and_spread(values)
        steps = epochs / teacher_epochs
        gap = mean - mean_and_spread(by_row["teacher", teacher_epochs])[0]
        summary[f"{what}/{epochs}"] = {
            "mean": mean,
            "std": spread,
            "seeds": len(values),
            "share_of_teacher_steps": steps,
            "difference_to_teacher": gap,
        }
        rows.append(
            f"| {labels[what]} | {epochs} | {100 * steps:.0f} % | "
            f"{100 * mean:.2f} ± {100 * spread:.2f} | {100 * gap:+.2f} |"
        )
    lines = [
        "| model | epochs | of the teacher's steps | test accuracy, % | difference |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"{max(map(len, by_row.values()))} seeds; mean ± standard deviation.",
        "",
        "| model | multiply-adds, millions | images/s (`predict`) |",
        "|---|---|---|",
    ]
    for model in ("teacher", "token_learner"):
        count = "-" if flops is None else f"{flops[model] / 1e6:.1f}"
        speed = "-"
        if model in speeds:
            mean, spread = mean_and_spread(speeds[model])
            speed = f"{mean:,.0f} ± {spread:,.0f}"
        lines.append(f"| {model} | {count} | {speed} |")
    lines += [
        "",
        "| few-shot, frozen features | shots | ViT, % | with TokenLearner, % |",
        "|---|---|---|---|",
    ]
    for (dataset, shots), cells in sorted(few.items()):
        if dataset == "average":
            continue
        texts = []
        for model in ("teacher", "token_learner"):
            if model in cells:
                mean, spread = mean_and_spread(cells[model])
                texts.append(f"{100 * mean:.2f} ± {100 * spread:.2f}")
            else:
                texts.append("-")
        lines.append(f"| {dataset} | {shots} | {' | '.join(texts)} |")
    table = "\n".join(lines)
    (output / "table.md").write_text(table + "\n")
    results.values["summary"] = summary
    results.write()
    print(table)
    plot(by_row, labels, teacher_epochs, output / "accuracy.png")


def plot(by_row, labels, teacher_epochs, path):
    try:
        import matplotlib
    except ImportError:
        print("No plot: Matplotlib is not installed. `--report` draws it later.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for what, style in (("regions", "o-"), ("random", "s--")):
        points = sorted((e, v) for (w, e), v in by_row.items() if w == what)
        if points:
            axes.errorbar(
                [epochs for epochs, _ in points],
                [100 * np.mean(values) for _, values in points],
                [100 * np.std(values) for _, values in points],
                fmt=style,
                capsize=3,
                label=labels[what],
            )
    for what, color in (("teacher", "black"), ("scratch", "gray")):
        values = by_row.get((what, teacher_epochs))
        if values:
            mean, spread = 100 * np.mean(values), 100 * np.std(values)
            axes.axhline(mean, color=color, label=f"{labels[what]}, {teacher_epochs}")
            axes.axhspan(mean - spread, mean + spread, color=color, alpha=0.15)
    axes.set(xlabel="epochs of recovery", ylabel="test accuracy, %")
    axes.legend(fontsize="small", loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    arguments = parse_arguments(argv)
    settings = QUICK if arguments.quick else FULL
    output = Path(arguments.output + ("_quick" if arguments.quick else ""))
    output.mkdir(parents=True, exist_ok=True)
    header = {
        "settings": settings,
        "token_learner": arguments.token_learner,
        "learning_rate": arguments.learning_rate,
        "keras": keras.version(),
        "backend": keras.backend.backend(),
        "num_tokens": NUM_TOKENS,
        "location": LOCATION,
    }
    results = Results(output / "results.json", header)
    if not arguments.report:
        data = load_fashion_mnist(arguments.data_dir)
        sizes = (settings["train_images"], settings["test_images"])
        data = [(x[:size], y[:size]) for (x, y), size in zip(data, sizes)]
        for seed in arguments.seeds:
            run_seed(seed, arguments, settings, data, results, output)
    report(results, settings, arguments.token_learner, output)


if __name__ == "__main__":
    main()
