"""Makes a trained ViT about twice as fast, and shows what that costs.

    python examples/make_vit_faster.py
    python examples/make_vit_faster.py --quick
    python examples/make_vit_faster.py --report
    KERAS_BACKEND=jax python examples/make_vit_faster.py --workers 8

Trains a ViT on Fashion-MNIST (the teacher), inserts a TokenLearner with 8 tokens in
its middle, and recovers the accuracy by distillation for 1, 2 and 5 epochs. Beside
these: the inserted TokenLearner before any training, started as spread regions and at
random; the same model trained from scratch; and the few-shot accuracy of the frozen
features.

In `--output` you find results.json, the table (table.md) and accuracy.png. Every stage
is saved: started again after a stop, the script goes on with the first one that is
missing. `--workers` lets as many processes share a GPU, which one small model leaves
idle most of the time; speeds are measured when nothing else runs. `--report` only
writes the table and the plot, and fills in FLOPs if they were counted nowhere yet (that
needs TensorFlow; all else runs on any Keras backend).
"""

import argparse
import concurrent.futures
import functools
import gzip
import json
import multiprocessing
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Workers share the memory of a GPU, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

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
SPEED_BATCHES = (1, 32, 256)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="runs/make_vit_faster")
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--quick", action="store_true", help="one seed, few images")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument(
        "--workers", type=int, default=1, help="number of processes that train at once"
    )
    parser.add_argument(
        "--speeds",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure images/s; leave it for later while other programs run",
    )
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
    if arguments.workers < 1:
        parser.error("--workers must be at least 1")
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


def compile_forward(model):
    """A compiled function from a batch of images to scores."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        @jax.jit
        def call(trainable, others, images):
            return model.stateless_call(trainable, others, images, training=False)[0]

        weights = [
            [variable.value for variable in variables]
            for variables in (model.trainable_variables, model.non_trainable_variables)
        ]
        return lambda images: call(*weights, images)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(lambda images: model(images, training=False))

    import torch

    def call(images):
        with torch.no_grad():
            return model(images, training=False)

    return call


def images_per_second(models, images, batch_size=500, rounds=7, round_seconds=0.5):
    """Medians of rounds of `round_seconds`, in which the models take turns.

    The batch stays on the device: feeding it is no work of the model.
    """
    batch = keras.ops.convert_to_tensor(images[:batch_size])
    forwards = {name: compile_forward(model) for name, model in models.items()}

    def seconds(name, calls):
        start = time.perf_counter()
        for _ in range(calls):
            scores = forwards[name](batch)
        keras.ops.convert_to_numpy(scores)  # waits for the device
        return time.perf_counter() - start

    calls, results = {}, {name: [] for name in models}
    for name in models:
        fastest = min(seconds(name, 1) for _ in range(3))
        calls[name] = max(1, round(round_seconds / fastest))
    for _ in range(rounds):
        for name in models:
            speed = len(batch) * calls[name] / seconds(name, calls[name])
            results[name].append(speed)
    return {name: statistics.median(values) for name, values in results.items()}


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

    def add(self, name, stage):
        self.values["stages"][name] = stage
        self.write()
        print(f"{name}: {stage['result']} ({stage['seconds']:.0f} s)", flush=True)

    def write(self):
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.values, indent=1))
        os.replace(partial, self.path)


@functools.cache
def load_data(folder, train_images, test_images):
    (x, y), (x_test, y_test) = load_fashion_mnist(folder)
    return (
        (x[:train_images], y[:train_images]),
        (x_test[:test_images], y_test[:test_images]),
    )


class Stages:
    """What is done for one seed; every stage can run in a process of its own."""

    def __init__(self, seed, arguments, settings, output):
        self.seed, self.arguments, self.settings = seed, arguments, settings
        self.folder = output / f"seed{seed}"
        self.folder.mkdir(exist_ok=True)
        self.features = output / "features"
        self.data = load_data(
            arguments.data_dir, settings["train_images"], settings["test_images"]
        )

    @staticmethod
    def names(settings):
        """All stages, and the ones that each needs first."""
        last, end = max(settings["recovery_epochs"]), settings["teacher_epochs"]
        needs = {"teacher": (), f"scratch/{end}": ()}
        # The longest first.
        for epochs in sorted(settings["recovery_epochs"], reverse=True):
            needs[f"regions/{epochs}"] = ("teacher",)
        needs[f"random/{last}"] = ("teacher",)
        needs.update({"random/0": ("teacher",), "regions/0": ("teacher",)})
        needs["few_shot/teacher"] = ("teacher",)
        needs["few_shot/token_learner"] = (f"regions/{last}",)
        return needs

    def load(self, path):
        return keras.saving.load_model(self.folder / path, compile=False)

    def save(self, model, path):
        partial = self.folder / f"partial_{path}"
        model.save(partial)
        os.replace(partial, self.folder / path)

    def train(self, name, **arguments):
        keras.utils.set_random_seed(self.seed)
        model = make_vit(self.settings, **arguments)
        train(
            model,
            self.data[0],
            self.settings,
            self.settings["teacher_epochs"],
            self.arguments.learning_rate,
            self.seed,
            self.folder / f"backup_{name}",
        )
        self.save(model, f"{name}.keras")
        return accuracy(model, self.data[1])

    def teacher(self):
        return self.train("teacher")

    def scratch(self, epochs):
        return self.train(
            "scratch",
            num_tokens=NUM_TOKENS,
            token_learner=self.arguments.token_learner,
        )

    def random(self, epochs):
        return self.recover("random", int(epochs))

    def regions(self, epochs):
        return self.recover("regions", int(epochs))

    def recover(self, start, epochs):
        teacher = self.load("teacher.keras")
        keras.utils.set_random_seed(self.seed)
        student = tlk.insert_token_learner(
            teacher,
            LOCATION,
            NUM_TOKENS,
            token_learner=self.arguments.token_learner,
            regions_from=self.data[0][0][:256] if start == "regions" else None,
        )
        if epochs:
            distill_token_learner(
                student,
                teacher,
                Batches(*self.data[0], self.settings["batch_size"], 1000 + self.seed),
                epochs=epochs,
                learning_rate=self.arguments.learning_rate,
                verbose=2,
            )
        if start == "regions" and epochs == max(self.settings["recovery_epochs"]):
            self.save(student, "token_learner.keras")
        return accuracy(student, self.data[1])

    def few_shot(self, which):
        digits = load_digits()
        report = few_shot(
            self.load(f"{which}.keras"),
            {"fashion_mnist": self.data, **({"digits": digits} if digits else {})},
            shots=(1, 5, 10),
            batch_size=500,
            cache_dir=self.features,
            verbose=0,
        )
        return report.summary

    def images_per_second(self):
        names = ("teacher", "token_learner")
        models = {name: self.load(f"{name}.keras") for name in names}
        return {
            str(batch_size): images_per_second(models, self.data[1][0], batch_size)
            for batch_size in SPEED_BATCHES
        }


def device_name():
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        device = jax.devices()[0]
        if device.platform != "cpu":
            return device.device_kind
    elif backend == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        if gpus:
            return tf.config.experimental.get_device_details(gpus[0])["device_name"]
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def run_stage(seed, stage, arguments, settings, output):
    """The result of one stage, and where it is from."""
    start = time.perf_counter()
    name, *rest = stage.split("/")
    result = getattr(Stages(seed, arguments, settings, output), name)(*rest)
    return {
        "result": result,
        "seconds": round(time.perf_counter() - start, 1),
        "backend": keras.backend.backend(),
        "device": device_name(),
    }


class ThisProcess(concurrent.futures.Executor):
    """Runs what it is given at once."""

    def submit(self, function, /, *arguments):
        future = concurrent.futures.Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def run_missing(arguments, settings, results, output):
    """Runs the stages that results.json lacks; returns the names of those that fail."""
    stages = results.values["stages"]
    needs = Stages.names(settings)
    waiting = [
        (seed, stage)
        for stage in needs
        for seed in arguments.seeds
        if f"seed{seed}/{stage}" not in stages
    ]
    speed = "images_per_second"
    # It does not depend on the seed.
    measured = any(name.endswith(speed) for name in stages)
    speeds = arguments.seeds[:1] if arguments.speeds and not measured else []
    if not waiting and not speeds:
        return []
    if arguments.workers == 1:
        pool = ThisProcess()
    else:
        # A process that has used a GPU cannot be forked.
        context = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(arguments.workers, context)
    running, failed = {}, []

    def submit(seed, stage):
        return pool.submit(run_stage, seed, stage, arguments, settings, output)

    def finish(future, seed, stage):
        try:
            results.add(f"seed{seed}/{stage}", future.result())
        except Exception as error:  # the others go on
            failed.append(f"seed{seed}/{stage}")
            print(f"{failed[-1]} failed: {type(error).__name__}: {error}", flush=True)

    with pool:
        while waiting or running:
            for seed, stage in list(waiting):
                if all(f"seed{seed}/{name}" in stages for name in needs[stage]):
                    waiting.remove((seed, stage))
                    running[submit(seed, stage)] = (seed, stage)
                    if arguments.workers == 1:
                        break
            if not running:
                break  # what is left waits for a stage that failed
            done, _ = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                finish(future, *running.pop(future))
        for seed in speeds if not failed else ():
            # While nothing else runs.
            finish(submit(seed, speed), seed, speed)
    return failed


def mean_and_spread(values):
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return float(np.mean(values)), float(spread)


def sentences(summary):
    """Whether the accuracy came back: 0.5 points, 20 % of the steps."""
    found = []
    for start in ("regions", "random"):
        cells = {
            int(name.split("/")[1]): cell
            for name, cell in summary.items()
            if name.startswith(f"{start}/") and cell["share_of_teacher_steps"] <= 0.2
        }
        if not any(cells):
            continue
        met = [
            e for e, cell in cells.items() if cell["difference_to_teacher"] >= -0.005
        ]
        epochs = min(met) if met else max(cells)
        cell = cells[epochs]
        found.append(
            f"{LABELS[start].split(', ')[1]}, "
            + (f"yes, after {epochs}" if met else f"no, not after {epochs}")
            + f" epoch{'s' if epochs > 1 else ''}, "
            f"{100 * cell['share_of_teacher_steps']:.0f} % of the steps "
            f"({100 * cell['difference_to_teacher']:+.2f} points)"
        )
    if not found:
        return []
    return [
        "",
        "Within 0.5 points of the teacher after at most 20 % of its training steps: "
        f"{'; '.join(found)}.",
    ]


LABELS = {
    "teacher": "ViT (teacher)",
    "random": "inserted, random start",
    "regions": "inserted, start as regions",
    "scratch": "TokenLearner ViT from scratch",
}


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
            speeds = stage["result"]
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
    labels = LABELS
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
        f"{max(map(len, by_row.values()))} seeds; mean ± sample standard deviation.",
        *sentences(summary),
        "",
        "| model | multiply-adds, millions "
        + "".join(f"| images/s, batch {batch} " for batch in speeds)
        + "|",
        "|---|---:" + "|---:" * len(speeds) + "|",
    ]
    labels = {**labels, "token_learner": "with TokenLearner"}
    for model in ("teacher", "token_learner"):
        count = "-" if flops is None else f"{flops[model] / 1e6:.1f}"
        cells = [count, *(f"{by_model[model]:,.0f}" for by_model in speeds.values())]
        lines.append(f"| {labels[model]} | {' | '.join(cells)} |")
    ratios = [
        "-" if flops is None else f"{flops['teacher'] / flops['token_learner']:.2f}",
        *(f"{by['token_learner'] / by['teacher']:.2f}" for by in speeds.values()),
    ]
    lines.append(f"| ratio | {' | '.join(ratios)} |")
    devices = {
        f"{stage.get('device', 'device unknown')}, {stage['backend']} backend"
        for name, stage in stages.items()
        if name.endswith("/images_per_second")
    }
    if devices:
        lines += ["", f"Measured on: {'; '.join(sorted(devices))}."]
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
    for what, style in (("regions", "o-"), ("random", "s")):
        points = sorted((e, v) for (w, e), v in by_row.items() if w == what)
        if points:
            axes.errorbar(
                [epochs for epochs, _ in points],
                [100 * np.mean(values) for _, values in points],
                [100 * mean_and_spread(values)[1] for _, values in points],
                fmt=style,
                capsize=3,
                label=labels[what],
            )
    for what, color in (("teacher", "black"), ("scratch", "gray")):
        values = by_row.get((what, teacher_epochs))
        if values:
            mean, spread = (100 * value for value in mean_and_spread(values))
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
        "num_tokens": NUM_TOKENS,
        "location": LOCATION,
    }
    results = Results(output / "results.json", header)
    failed = []
    if not arguments.report:
        failed = run_missing(arguments, settings, results, output)
    report(results, settings, arguments.token_learner, output)
    if failed:
        raise SystemExit(f"These stages failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
