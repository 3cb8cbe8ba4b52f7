"""Accuracy against computation, with and without learned tokens (paper, section 4).

    python examples/trade_off.py
    KERAS_BACKEND=jax python examples/trade_off.py --mixed-precision --workers 10
    python examples/trade_off.py --report

Trains small ViTs on Fashion-MNIST, enlarged to 56 x 56 pixels: 196 patches. All have
the same width; they differ in

- the number of blocks, without a TokenLearner;
- where the TokenLearner stands (figure 4): before the first block, or after 1/4, 1/2 or
  3/4 of the blocks;
- blocks added behind and before a TokenLearner in the middle (table 1);
- the number of tokens;
- the TokenLearner: the paper's (v1) or one of the authors' later two;
- what makes the tokens: a TokenLearner, or one of the alternatives of section 5.3.

Every model is trained once with seed 0, then once with seed 1, and so on: a command
that is stopped early leaves whole tables. Each finished run is added to results.json in
`--output`; started again, the script goes on with the first one that is missing.
Small models leave a GPU waiting for the next operation: with `--workers`, as many
processes share it, each with models of its own. Speeds are measured after all
training, one model at a time.

`--report` trains nothing and writes table.md, trade_off.png (after figure 5) and
locations.png (after figure 4) from results.json. It counts the FLOPs, for which it
needs TensorFlow; the training runs on any Keras backend.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import gzip
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Workers share the memory of a GPU, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

import keras
import numpy as np

import tokenlearner_keras as tlk

# The fractions of the ViT's blocks that have a ViT, and a TokenLearner, of their own.
FRACTIONS = {"1/4": 0.25, "1/2": 0.5, "3/4": 0.75}
NUM_TOKENS = 8
OTHER_NUM_TOKENS = (4, 16, 32)
# Blocks, in those of the ViT, and tokens. Table 1 has 20 to 22 blocks instead of 12,
# at less than the ViT's cost, as here.
ADDED = ((1.5, 8), (1.75, 8), (1.75, 16))
TOKENIZERS = {
    "grid": tlk.layers.GridTokenizer,
    "dense": tlk.layers.DenseTokenizer,
    "pooling": tlk.layers.PoolingTokenizer,
}
GROUPS = {
    "vit": "ViT",
    "location": "TokenLearner, by location",
    "added": "TokenLearner, added layers",
    "num_tokens": "TokenLearner, by number of tokens",
    "variant": "TokenLearner, later variants",
    "tokenizer": "other tokenizers (section 5.3)",
}
EVALUATION_BATCH = 1000


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One row of the table: a model that is trained once for each seed."""

    name: str
    label: str
    group: str
    num_layers: int
    location: int | None = None
    num_tokens: int | None = None
    token_learner: str = "v1"


def make_configurations(num_layers):
    """Returns the rows of the table by name, for a ViT of `num_layers` blocks."""
    rows = {}

    def add(
        name, label, group, layers=num_layers, at=0.5, tokens=NUM_TOKENS, kind="v1"
    ):
        location = None if tokens is None else int(at * layers)
        rows[name] = Configuration(name, label, group, layers, location, tokens, kind)

    for part, fraction in FRACTIONS.items():
        layers = round(fraction * num_layers)
        add(f"vit_{part}", f"ViT, {layers} layers", "vit", layers, tokens=None)
    add("vit", f"ViT, {num_layers} layers (base)", "vit", tokens=None)
    for part, at in {"0": 0.0, **FRACTIONS}.items():
        add(f"location_{part}", f"TokenLearner at {part}", "location", at=at)
    for factor, tokens in ADDED:
        layers = round(factor * num_layers)
        label = "TokenLearner" if tokens == NUM_TOKENS else f"{tokens}-TokenLearner"
        label = f"{label} at 1/2, {layers} layers"
        add(f"added_{factor}_{tokens}", label, "added", layers, tokens=tokens)
    for tokens in OTHER_NUM_TOKENS:
        label = f"TokenLearner at 1/2, {tokens} tokens"
        add(f"num_tokens_{tokens}", label, "num_tokens", tokens=tokens)
    for kind in ("v10", "v11"):
        add(kind, f"TokenLearner {kind} at 1/2", "variant", kind=kind)
    for kind, layer in TOKENIZERS.items():
        add(kind, f"{layer.__name__} at 1/2", "tokenizer", kind=kind)
    return rows


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="runs/trade_off")
    parser.add_argument(
        "--data-dir",
        default="/usr/share/datasets/fashion-mnist",
        help="folder of the four IDX files; if it is not there, Keras downloads them",
    )
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--image-size", type=int, default=56)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--hidden-dim", type=int, default=64)
    parser.add_argument("--num-layers", type=int, default=8, help="of the base ViT")
    parser.add_argument("--num-heads", type=int, default=2)
    parser.add_argument("--mlp-dim", type=int, default=128)
    parser.add_argument("--train-images", type=int, default=60_000)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument(
        "--mixed-precision", action="store_true", help="bfloat16, for GPUs and TPUs"
    )
    parser.add_argument(
        "--jit-compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="XLA on the TensorFlow backend; JAX always has it",
    )
    parser.add_argument(
        "--flash-attention",
        action=argparse.BooleanOptionalAction,
        help="fused attention, in bfloat16 on GPUs; by default where Keras finds it",
    )
    parser.add_argument(
        "--configurations", nargs="+", help="names of some rows; all if not given"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="start no run that would end after this time, speeds excepted",
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="number of processes that train at once"
    )
    parser.add_argument("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args(argv)
    if arguments.num_layers < 4 or arguments.num_layers % 4:
        parser.error("--num-layers must be a multiple of 4, so that it has quarters")
    if min(arguments.seeds, arguments.epochs, arguments.workers) < 1:
        parser.error("--seeds, --epochs and --workers must be at least 1")
    if not 1 <= arguments.batch_size <= arguments.train_images:
        parser.error("--batch-size must be from 1 to --train-images")
    known = make_configurations(arguments.num_layers)
    for name in arguments.configurations or ():
        if name not in known:
            parser.error(
                f"--configurations must be of {', '.join(known)}; received {name}"
            )
    return arguments


# What a run's result depends on, besides its configuration and its seed.
SETTINGS = (
    "epochs",
    "batch_size",
    "learning_rate",
    "image_size",
    "patch_size",
    "hidden_dim",
    "num_layers",
    "num_heads",
    "mlp_dim",
    "train_images",
    "test_images",
    "mixed_precision",
)


def load_fashion_mnist(folder):
    """uint8 images, (examples, 28, 28, 1), and labels, for training and test."""
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
    return [(images[..., None], labels.astype("int32")) for images, labels in arrays]


class Batches(keras.utils.PyDataset):
    """Shuffled batches; images shifted by up to 2 pixels and half of them mirrored."""

    def __init__(self, images, labels, batch_size, seed):
        super().__init__()
        self.height, self.width = images.shape[1:3]
        self.images = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)])
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
            (y + np.arange(self.height))[:, :, None],
            (x + np.arange(self.width))[:, None],
        ]
        mirror = rng.random(len(rows)) < 0.5
        images[mirror] = images[mirror, :, ::-1]
        return images, self.labels[rows]


def make_vit(configuration, arguments, seed=0):
    keras.utils.set_random_seed(seed)
    model = tlk.models.vit(
        tlk.models.ViTConfig(
            arguments.patch_size,
            arguments.hidden_dim,
            configuration.num_layers,
            arguments.num_heads,
            arguments.mlp_dim,
        ),
        input_shape=(arguments.image_size, arguments.image_size, 1),
        num_classes=10,
        num_tokens=configuration.num_tokens,
        tokenizer_location=configuration.location or 0,
        token_learner=TOKENIZERS.get(
            configuration.token_learner, configuration.token_learner
        ),
    )
    # ViT starts its position embeddings near zero, which takes a long training to
    # outgrow. Here they start at the scale of the patches.
    (positions,) = model.get_layer("position_embedding").weights
    rng = np.random.default_rng(seed)
    positions.assign(0.3 * rng.standard_normal(positions.shape))
    return model


class Model:
    """The model of one configuration, compiled once and trained from several seeds."""

    def __init__(self, configuration, arguments, image_shape):
        self.configuration, self.arguments = configuration, arguments
        self.vit = make_vit(configuration, arguments)
        size = arguments.image_size
        inputs = keras.Input(image_shape, dtype="uint8")
        x = keras.layers.Rescaling(1 / 127.5, -1, dtype="float32")(inputs)
        x = keras.layers.Resizing(size, size, dtype="float32")(x)
        self.model = keras.Model(inputs, self.vit(x))
        steps = arguments.epochs * (arguments.train_images // arguments.batch_size)
        warmup_steps = steps // 10
        schedule = keras.optimizers.schedules.CosineDecay(
            0.0,
            max(steps - warmup_steps, 1),
            warmup_target=arguments.learning_rate,
            warmup_steps=warmup_steps,
        )
        self.model.compile(
            keras.optimizers.AdamW(schedule, weight_decay=0.05, global_clipnorm=1.0),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            # Without it, the JAX backend compiles nothing at all.
            jit_compile=arguments.jit_compile or keras.backend.backend() == "jax",
        )
        self.forward = self._compile_forward()

    def run(self, data, seed):
        """Trains from `seed` on; returns what is kept of the run."""
        (images, labels), test = data
        self.vit.set_weights(
            make_vit(self.configuration, self.arguments, seed).get_weights()
        )
        optimizer = self.model.optimizer
        optimizer.build(self.model.trainable_variables)
        for variable in optimizer.variables:
            variable.assign(keras.ops.zeros(variable.shape, variable.dtype))
        history = self.model.fit(
            Batches(images, labels, self.arguments.batch_size, seed),
            epochs=self.arguments.epochs,
            shuffle=False,
            verbose=0,
        ).history
        return {
            "accuracy": self.accuracy(*test),
            "loss": float(history["loss"][-1]),
            "parameters": self.vit.count_params(),
        }

    def speeds(self, data):
        """Images a second in inference and training; trains the model on a little."""
        (images, labels), (test_images, _) = data
        batch_size = self.arguments.batch_size
        count = min(20 * batch_size, len(images) // batch_size * batch_size)
        batches = Batches(images[:count], labels[:count], batch_size, 0)
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            self.model.fit(batches, shuffle=False, verbose=0)
            seconds.append(time.perf_counter() - start)
        return {
            "images_per_second": self.images_per_second(test_images),
            # The first call may compile the model.
            "training_images_per_second": count / statistics.median(seconds[1:]),
        }

    def accuracy(self, images, labels):
        batch_size = min(EVALUATION_BATCH, len(images))
        # Whole batches, so that one compiled function does for all.
        padded = np.resize(
            images, (-(-len(images) // batch_size) * batch_size, *images.shape[1:])
        )
        scores = [
            keras.ops.convert_to_numpy(self.forward(padded[i : i + batch_size]))
            for i in range(0, len(padded), batch_size)
        ]
        classes = np.concatenate(scores)[: len(images)].argmax(-1)
        return float(np.mean(classes == labels))

    def images_per_second(self, images, rounds=5, round_seconds=0.2):
        """Median of `rounds`, each of as many calls as fill `round_seconds`."""
        batch = keras.ops.convert_to_tensor(images[:EVALUATION_BATCH])

        def seconds(calls):
            start = time.perf_counter()
            for _ in range(calls):
                scores = self.forward(batch)
            keras.ops.convert_to_numpy(scores)  # waits for the device
            return time.perf_counter() - start

        calls = max(1, round(round_seconds / min(seconds(1) for _ in range(3))))
        return (
            len(batch)
            * calls
            / statistics.median(seconds(calls) for _ in range(rounds))
        )

    def _compile_forward(self):
        """A compiled function from a batch of images to scores."""
        model = self.model
        backend = keras.backend.backend()
        if backend == "jax":
            import jax

            @jax.jit
            def call(trainable, others, images):
                scores, _ = model.stateless_call(
                    trainable, others, images, training=False
                )
                return scores

            return lambda images: call(
                [variable.value for variable in model.trainable_variables],
                [variable.value for variable in model.non_trainable_variables],
                images,
            )
        if backend == "tensorflow":
            import tensorflow as tf

            function = tf.function(
                lambda images: model(images, training=False),
                jit_compile=self.arguments.jit_compile,
            )
            return lambda images: function(tf.convert_to_tensor(images))

        import torch

        def call(images):
            with torch.no_grad():
                return model(images, training=False)

        return call


class Results:
    """The finished runs, written after each."""

    def __init__(self, path, settings):
        self.path = path
        self.values = {"settings": settings, "runs": {}, "speeds": {}, "gflops": {}}
        if path.exists():
            self.values = json.loads(path.read_text())
            for key, value in settings.items():
                old = self.values["settings"][key]
                if old != value:
                    raise SystemExit(
                        f"{path} has results of another {key}: {old} instead of "
                        f"{value}. Choose another --output."
                    )

    @property
    def runs(self):
        return self.values["runs"]

    def write(self):
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.values, indent=1))
        os.replace(partial, self.path)


@functools.cache
def load_data(folder, train_images, test_images):
    data = load_fashion_mnist(folder)
    sizes = {"train": train_images, "test": test_images}
    for (images, _), (part, size) in zip(data, sizes.items()):
        if len(images) < size:
            raise SystemExit(
                f"--{part}-images is {size}, but there are {len(images)} of them"
            )
    return [(x[:size], y[:size]) for (x, y), size in zip(data, sizes.values())]


class Worker:
    """Trains models, and keeps each for its next seed. One a process."""

    models: dict = {}  # noqa: RUF012

    @classmethod
    def call(cls, task, name, arguments, seed=None):
        """`task` is "run" or "speeds"; returns the result and where it is from."""
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy(
            "mixed_bfloat16" if arguments.mixed_precision else "float32"
        )
        if arguments.flash_attention is not None:
            if arguments.flash_attention:
                keras.config.enable_flash_attention()
            else:
                keras.config.disable_flash_attention()
        try:
            sizes = arguments.train_images, arguments.test_images
            data = load_data(arguments.data_dir, *sizes)
            if name not in cls.models:
                row = make_configurations(arguments.num_layers)[name]
                cls.models[name] = Model(row, arguments, data[0][0].shape[1:])
            start = time.perf_counter()
            result = getattr(cls.models[name], task)(
                data, *[] if seed is None else [seed]
            )
            return {
                **result,
                "seconds": round(time.perf_counter() - start, 1),
                "device": device_name(),
                "backend": keras.backend.backend(),
                "keras": keras.version(),
            }
        finally:
            keras.config.set_dtype_policy(policy)


class ThisProcess(concurrent.futures.Executor):
    """Runs what it is given at once."""

    def submit(self, function, /, *arguments):
        future = concurrent.futures.Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def cost(row, arguments):
    """What a model costs, roughly: tokens of all blocks."""
    patches = (arguments.image_size // arguments.patch_size) ** 2
    if row.num_tokens is None:
        return patches * row.num_layers
    return patches * row.location + row.num_tokens * (row.num_layers - row.location)


def share_out(configurations, arguments, runs):
    """The worker of each configuration; all get about as much to do.

    `runs` is the number of runs of each, by name.
    """

    def work(row):
        # Compiling takes as long as some runs; preparing images is the same for all.
        return 3000 + runs.get(row.name, 0) * (500 + cost(row, arguments))

    load = [0] * arguments.workers
    workers = {}
    for row in sorted(configurations, key=work, reverse=True):
        workers[row.name] = load.index(min(load))
        load[workers[row.name]] += work(row)
    return workers


def train_missing(configurations, arguments, results):
    """Trains what results.json lacks: all models with seed 0, then all with seed 1.

    Returns the names of the runs that failed.
    """
    missing = [
        (seed, row)
        for seed in range(arguments.seeds)
        for row in configurations.values()
        if f"{row.name}/seed{seed}" not in results.runs
    ]
    unmeasured = [n for n in configurations if n not in results.values["speeds"]]
    if not missing and not unmeasured:
        return []
    # Before any worker is asked: are the files there?
    load_data(arguments.data_dir, arguments.train_images, arguments.test_images)
    start = time.perf_counter()
    Worker.models.clear()
    runs = Counter(row.name for _, row in missing)
    worker_of = share_out(configurations.values(), arguments, runs)
    if arguments.workers == 1:
        workers = [ThisProcess()]
    else:
        # A process that has used a GPU cannot be forked.
        context = multiprocessing.get_context("spawn")
        workers = [
            concurrent.futures.ProcessPoolExecutor(1, context)
            for _ in range(arguments.workers)
        ]
    queues = [[] for _ in workers]
    for seed, row in missing:
        queues[worker_of[row.name]].append((seed, row))
    for name in unmeasured:
        if arguments.workers > 1 and name not in runs:
            # Compiled while others train; the speed is not looked at.
            queues[worker_of[name]].append((None, configurations[name]))
    running, latest, failed, left = {}, {}, [], set()
    finished = 0

    def minutes_are_over(name):
        if arguments.minutes is None:
            return False
        needed = latest.get(name, max(latest.values(), default=0.0))
        return 60 * arguments.minutes - (time.perf_counter() - start) < needed

    def start_next(index):
        if not queues[index]:
            return
        seed, row = queues[index][0]
        if minutes_are_over(row.name):
            left.update(
                (row.name, seed) for seed, row in queues[index] if seed is not None
            )
            queues[index].clear()
            return
        queues[index].pop(0)
        now = time.perf_counter()
        task = "speeds" if seed is None else "run"
        future = workers[index].submit(Worker.call, task, row.name, arguments, seed)
        running[future] = (index, seed, row, now)

    for index in range(len(workers)):
        start_next(index)
    while running:
        done, _ = concurrent.futures.wait(
            running, return_when=concurrent.futures.FIRST_COMPLETED
        )
        for future in done:
            index, seed, row, began = running.pop(future)
            if seed is None:
                start_next(index)
                continue
            name = f"{row.name}/seed{seed}"
            finished += 1
            try:
                run = future.result()
            except Exception as error:  # the others go on
                print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
                failed.append(name)
                # With another seed it would fail as well.
                queues[index] = [item for item in queues[index] if item[1] != row]
            else:
                latest[row.name] = time.perf_counter() - began
                results.runs[name] = run
                results.write()
                print(
                    f"{finished} of {len(missing)}: seed {seed}, {row.label}: "
                    f"{100 * run['accuracy']:.2f} % in {latest[row.name]:.0f} s",
                    flush=True,
                )
            start_next(index)
    trained = {name.rsplit("/seed", 1)[0] for name in results.runs}
    for name in unmeasured:
        if name not in trained:
            continue
        # One after the other, while nothing else runs.
        worker = workers[worker_of[name]]
        speeds = worker.submit(Worker.call, "speeds", name, arguments).result()
        results.values["speeds"][name] = speeds
        results.write()
    for worker in workers:
        worker.shutdown()
    if left:
        print(f"{len(left)} runs are left for the next command.")
    return failed


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
    else:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name(0)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def count_gflops(configurations, arguments, results):
    """Fills in the GFLOPs of one image, as table 1 counts; says so if it cannot."""
    gflops = results.values["gflops"]
    trained = {name.rsplit("/seed", 1)[0] for name in results.runs}
    counted = False
    policy = keras.config.dtype_policy()
    # Casts are operations too; the table's are of float32 models.
    keras.config.set_dtype_policy("float32")
    try:
        for row in configurations.values():
            if row.name in trained and row.name not in gflops:
                model = make_vit(row, arguments)
                gflops[row.name] = tlk.count_flops(model, convention="xla").total / 1e9
                counted = True
    except (ImportError, ValueError) as error:
        print(f"FLOPs are not counted here: {error}")
    finally:
        keras.config.set_dtype_policy(policy)
    if counted:
        results.write()


def collect(configurations, results):
    """Returns what the table and the plots show, by configuration."""
    runs, speeds = results.runs, results.values["speeds"]
    devices = Counter(speed["device"] for speed in speeds.values())
    device = devices.most_common(1)[0][0] if devices else None
    rows = {}
    for row in configurations.values():
        own = {
            name.rsplit("/seed", 1)[1]: run
            for name, run in runs.items()
            if name.rsplit("/seed", 1)[0] == row.name
        }
        if not own:
            continue
        # Speeds of one device alone are comparable.
        speed = speeds.get(row.name, {})
        speed = speed if speed.get("device") == device else {}
        accuracies = [100 * run["accuracy"] for run in own.values()]
        rows[row.name] = {
            "row": row,
            "accuracies": {s: 100 * run["accuracy"] for s, run in own.items()},
            "mean": statistics.mean(accuracies),
            "spread": statistics.stdev(accuracies) if len(own) > 1 else None,
            "gflops": results.values["gflops"].get(row.name),
            "parameters": next(iter(own.values()))["parameters"],
            "images_per_second": speed.get("images_per_second"),
            "training_images_per_second": speed.get("training_images_per_second"),
        }
    return rows, device


def difference(rows, name, other):
    """Mean and 95 % interval of the difference in accuracy, over the seeds of both."""
    from scipy import stats

    a, b = rows[name]["accuracies"], rows[other]["accuracies"]
    values = [a[seed] - b[seed] for seed in a if seed in b]
    if len(values) < 2:
        return None
    mean = statistics.mean(values)
    if statistics.stdev(values) == 0:
        return mean, mean, mean
    test = stats.ttest_1samp(values, 0)
    low, high = test.confidence_interval(0.95)
    return mean, float(low), float(high)


def verdict(interval):
    """What a difference says of the claim that the first is the better one."""
    _, low, high = interval
    if low > 0:
        return "held"
    return "did not hold" if high < 0 else "was not decided"


def percent(value):
    mean, low, high = value
    return f"{mean:+.2f} points (95 % interval {low:+.2f} to {high:+.2f})"


def claims(rows):
    """Sentences on the paper's claims; none where a row has fewer than two seeds."""
    sentences = []

    def compare(*names):
        if any(name not in rows for name in ("vit", "location_1/2", *names)):
            return None
        return difference(rows, *names)

    def cost(name, other):
        a, b = rows[name]["gflops"], rows[other]["gflops"]
        return "" if a is None or b is None else f" at {a / b:.2f} of its GFLOPs"

    middle = compare("location_1/2", "vit")
    late = compare("location_3/4", "vit")
    if middle and late:
        # In table 1, TokenLearner B/16 is 0.70 points behind ViT B/16.
        same = "held" if middle[1] >= -0.7 else "was not decided"
        same = "did not hold" if middle[2] < -0.7 else same
        sentences.append(
            "That a TokenLearner in the middle is about as accurate as the ViT (at "
            f"most the 0.7 points of table 1 behind it) {same} here: {percent(middle)}"
            f"{cost('location_1/2', 'vit')}; that one after 3/4 of the blocks is more "
            f"accurate {verdict(late)}: {percent(late)}{cost('location_3/4', 'vit')}."
        )
    added = "added_{}_{}".format(*ADDED[1])
    more = compare(added, "vit")
    if more:
        sentences.append(
            "That a TokenLearner with added layers is more accurate than a ViT that "
            f"costs more {verdict(more)} here: {percent(more)}{cost(added, 'vit')}, "
            f"with {rows[added]['row'].num_layers} layers instead of "
            f"{rows['vit']['row'].num_layers}."
        )
    others = {name: compare("location_1/2", name) for name in TOKENIZERS}
    if all(others.values()):
        sentences.append(
            "That learned tokens are more accurate than the other tokenizers "
            + ", ".join(
                f"{verdict(value)} against {TOKENIZERS[name].__name__}: "
                f"{percent(value)}"
                for name, value in others.items()
            )
            + "."
        )
    return sentences


def number(value, form):
    return "-" if value is None else format(value, form)


def report(configurations, arguments, results, output):
    """Writes the table and, where FLOPs are known and Matplotlib is there, plots."""
    if not results.runs:
        raise SystemExit("There are no results yet: run without --report first.")
    count_gflops(configurations, arguments, results)
    rows, device = collect(configurations, results)
    lines = [
        "| model | tokens | GFLOPs | parameters | test accuracy, % | seeds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    if device:
        lines[0] += " images/s | images/s, `fit` |"
        lines[1] += "---:|---:|"
    for values in rows.values():
        row = values["row"]
        spread = number(values["spread"], ".2f")
        lines.append(
            f"| {row.label} | {number(row.num_tokens, 'd')} "
            f"| {number(values['gflops'], '.4f')} | {values['parameters']:,} "
            f"| {values['mean']:.2f} ± {spread} | {len(values['accuracies'])} |"
        )
        if device:
            lines[-1] += (
                f" {number(values['images_per_second'], ',.0f')} "
                f"| {number(values['training_images_per_second'], ',.0f')} |"
            )
    precision = "mixed_bfloat16" if arguments.mixed_precision else "float32"

    def names(key):
        return "/".join(sorted({run[key] for run in results.runs.values()}))

    lines += [
        "",
        f"Fashion-MNIST at {arguments.image_size} x {arguments.image_size}, patches of "
        f"{arguments.patch_size} x {arguments.patch_size}: "
        f"{(arguments.image_size // arguments.patch_size) ** 2} patches; width "
        f"{arguments.hidden_dim}, {arguments.num_heads} heads, MLP "
        f"{arguments.mlp_dim}; {arguments.epochs} epochs of {arguments.train_images:,} "
        f"images, batches of {arguments.batch_size}, {precision}. Mean ± sample "
        "standard deviation over the seeds. GFLOPs as in the paper's table 1, in "
        f"float32. Trained on {names('device')}, {names('backend')} backend, Keras "
        f"{names('keras')}. "
        + (
            f"Speeds: medians on {device}, batches of {EVALUATION_BATCH} for "
            "inference; `fit` with the preparation of the images."
            if device
            else "Speeds were not measured."
        ),
    ]
    sentences = claims(rows)
    lines += ["", *sentences] if sentences else []
    text = "\n".join(lines)
    (output / "table.md").write_text(text + "\n")
    print(text)
    if any(values["gflops"] is None for values in rows.values()):
        print("No plots without FLOPs: use `--report` where TensorFlow is installed.")
        return
    try:
        import matplotlib
    except ImportError:
        print("No plots: Matplotlib is not installed. `--report` draws them later.")
        return
    matplotlib.use("Agg")
    plot_trade_off(rows, output / "trade_off.png")
    plot_locations(rows, output / "locations.png")


def plot_trade_off(rows, path):
    """Accuracy against GFLOPs, after figure 5."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    styles = dict(zip(GROUPS, ("ks-", "o-", "^-", "v--", "D", "x")))
    for group, label in GROUPS.items():
        points = [v for v in rows.values() if v["row"].group == group]
        if group == "num_tokens":
            # The middle is one of them.
            points += [v for v in rows.values() if v["row"].name == "location_1/2"]
        points.sort(key=lambda v: v["gflops"])
        if points:
            axes.errorbar(
                [v["gflops"] for v in points],
                [v["mean"] for v in points],
                [v["spread"] or 0 for v in points],
                fmt=styles[group],
                capsize=3,
                label=label,
            )
        for values in points:
            if group == "tokenizer":
                axes.annotate(
                    values["row"].name,
                    (values["gflops"], values["mean"]),
                    xytext=(5, -3),
                    textcoords="offset points",
                    fontsize=7,
                )
    axes.set(xlabel="GFLOPs of one image", ylabel="test accuracy, %")
    axes.legend(fontsize="small", loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_locations(rows, path):
    """Accuracy and GFLOPs by the location of the TokenLearner, after figure 4."""
    from matplotlib import pyplot as plt

    points = {
        **{v["row"].name[9:]: v for v in rows.values() if v["row"].group == "location"},
        **({"Base": rows["vit"]} if "vit" in rows else {}),
    }
    if not points:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
    left.errorbar(
        list(points),
        [v["mean"] for v in points.values()],
        [v["spread"] or 0 for v in points.values()],
        fmt="o",
        capsize=4,
    )
    left.set(ylabel="test accuracy, %")
    right.bar(list(points), [v["gflops"] for v in points.values()], width=0.6)
    right.set(ylabel="GFLOPs of one image")
    for axes in (left, right):
        axes.set(xlabel="location of the TokenLearner")
        axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    arguments = parse_arguments(argv)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "results.json"
    if arguments.report and path.exists():
        # The table is of the runs that are there, whatever the arguments.
        for key, value in json.loads(path.read_text())["settings"].items():
            setattr(arguments, key, value)
    settings = {key: getattr(arguments, key) for key in SETTINGS}
    results = Results(path, settings)
    configurations = make_configurations(arguments.num_layers)
    failed = []
    if not arguments.report:
        chosen = arguments.configurations or configurations
        failed = train_missing(
            {name: configurations[name] for name in chosen}, arguments, results
        )
    if results.runs or arguments.report:
        report(configurations, arguments, results, output)
    if failed:
        raise SystemExit(f"These runs failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
