"""One device against several on the JAX backend: the model's own training step.

    python benchmarks/distributed_jax.py

Keras's training step (forward, backward, AdamW, metrics) is compiled by XLA for one
device and for all of them, with the batch spread over the devices and the weights on
each. State and batch lie on the devices before anything is timed; one device and all of
them take turns in one process. The programs of a pair are compiled one after the other,
so that XLA finds what it tuned for the one before. Writes distributed_jax.md and .json
after each pair: a model in one precision.

`--check-steps 4` also compares the losses of the first steps on the same batches.
The batches are for devices of 141 GB, such as an H200; for smaller ones there are
`--batch-size` and `--memory-limit`.
`--models toy_vit toy_video --virtual-cpus 2` tries the script without a GPU. Flags
of XLA come from the environment variable `XLA_FLAGS`, and are named in the results.
"""

import argparse
import gc
import os
import sys
import time

os.environ["KERAS_BACKEND"] = "jax"
# Keras imports TensorFlow wherever it is installed: both bring CUDA's libraries.
sys.modules["tensorflow"] = None
# The rest is for the libraries, which the compiler tries on the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

PRECISIONS = ("mixed_bfloat16", "float32")
# Examples a device gets in a step that is timed, and in one that is checked.
BATCHES = {
    ("vit", "mixed_bfloat16"): (768, 8),
    ("vit", "float32"): (192, 8),
    ("video", "mixed_bfloat16"): (32, 1),
    ("video", "float32"): (20, 1),
    ("toy_vit", "mixed_bfloat16"): (8, 4),
    ("toy_vit", "float32"): (8, 4),
    ("toy_video", "mixed_bfloat16"): (2, 1),
    ("toy_video", "float32"): (2, 1),
}
MODELS = tuple(dict.fromkeys(model for model, _ in BATCHES))


def build(name, num_frames):
    import tokenlearner_keras as tlk

    if name == "vit":
        return tlk.models.vit("B/16", num_tokens=8)
    # Without dropout, as in `distributed.py`.
    if name == "video":
        shape = (num_frames, 224, 224, 3)
        return tlk.models.x2plus1d("M", input_shape=shape, num_tokens=8, dropout=0.0)
    if name == "toy_vit":
        config = tlk.models.ViTConfig(
            patch_size=16, hidden_dim=16, num_layers=1, num_heads=1, mlp_dim=16
        )
        shape = (32, 32, 3)
        return tlk.models.vit(config, input_shape=shape, num_tokens=2, num_classes=10)
    config = tlk.models.X2Plus1DConfig(
        stem_filters=4, filters=(4, 4, 4, 8), depths=(1, 1, 1, 1), head_filters=16
    )
    return tlk.models.x2plus1d(
        config, input_shape=(4, 64, 64, 3), num_classes=10, num_tokens=2, dropout=0.0
    )


def make_model(name, precision, num_frames):
    """Returns the compiled model of bytes, always with the same weights."""
    import keras

    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(precision)
    # Small programs without number, which a CPU compiles faster.
    with keras.device("cpu"):
        network = build(name, num_frames)
        inputs = keras.Input(network.input_shape[1:], dtype="uint8")
        images = keras.ops.cast(inputs, keras.config.floatx()) / 127.5 - 1
        model = keras.Model(inputs, network(images))
        optimizer = keras.optimizers.AdamW(1e-4, weight_decay=0.05)
        model.compile(
            optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        optimizer.build(model.trainable_variables)
    return model


def get_state(model):
    """Returns the state of a training step as NumPy arrays."""
    import numpy as np

    groups = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    return tuple([np.array(v.value) for v in variables] for variables in groups)


def make_batches(model, batch_size, num_batches):
    import numpy as np

    rng = np.random.default_rng(0)
    shape = batch_size, *model.input_shape[1:]
    return [
        (
            rng.integers(0, 256, shape, dtype="uint8"),
            rng.integers(0, model.output_shape[-1], batch_size, dtype="int32"),
        )
        for _ in range(num_batches)
    ]


class Program:
    """A training step for some devices: lowered, compiled, and then run."""

    def __init__(self, model, label, devices, batch_size):
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        self.label = f"{label}, {len(devices)} device(s), batch {batch_size}"
        self.batch_size = batch_size
        mesh = Mesh(np.array(devices), ("batch",))
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.shared = NamedSharding(mesh, PartitionSpec("batch"))

        def struct(x, sharding):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        start = time.perf_counter()
        state = jax.tree.map(lambda x: struct(x, self.whole), get_state(model))
        shape = batch_size, *model.input_shape[1:]
        batch = (
            jax.ShapeDtypeStruct(shape, "uint8", sharding=self.shared),
            jax.ShapeDtypeStruct(shape[:1], "int32", sharding=self.shared),
        )
        step = jax.jit(
            model.train_step,
            donate_argnums=0,
            out_shardings=(self.whole, self.whole),
        )
        self.lowered = step.lower(state, batch)
        log(f"{self.label}: lowered in {time.perf_counter() - start:.0f} s")

    def compile(self):
        from common import count_collective, program_bytes

        start = time.perf_counter()
        self.compiled = self.lowered.compile()
        self.lowered = None
        self.seconds = time.perf_counter() - start
        self.all_reduces = count_collective(self.compiled)
        arguments = self.compiled.memory_analysis().argument_size_in_bytes
        self.held = arguments / 2**30
        self.used = (program_bytes(self.compiled) - arguments) / 2**30
        log(
            f"{self.label}: compiled in {self.seconds:.0f} s, {self.all_reduces} "
            f"all-reduces, {self.held:.2f} GiB of arguments and {self.used:.2f} beside"
        )

    def place(self, state, batch):
        import jax

        self.state = jax.device_put(state, self.whole)
        self.batch = jax.device_put(batch, self.shared)
        jax.block_until_ready((self.state, self.batch))

    def run(self, steps):
        """Returns the seconds of so many steps."""
        import jax

        start = time.perf_counter()
        for _ in range(steps):
            logs, self.state = self.compiled(self.state, self.batch)
        jax.block_until_ready((logs, self.state))
        return time.perf_counter() - start

    def first_losses(self, state, batches, steps):
        import jax

        *placed, metrics = jax.device_put(state, self.whole)
        losses = []
        for index in range(steps):
            batch = jax.device_put(batches[index % len(batches)], self.shared)
            # Fresh metrics: else the log would hold the mean since the start.
            metrics = jax.device_put(state[-1], self.whole)
            logs, (*placed, _) = self.compiled((*placed, metrics), batch)
            losses.append(float(logs["loss"]))
        return losses


class Pair:
    """A model in one precision, on one device and on all of them."""

    def __init__(self, name, precision, devices, arguments):
        import jax

        self.name, self.precision = name, precision
        label = f"{name}, {precision}"
        model = make_model(name, precision, arguments.num_frames)
        self.state = get_state(model)
        timed, checked = BATCHES[name, precision]
        timed = arguments.batch_size or timed
        self.model = model  # for the shapes
        groups = devices[:1], devices
        self.timed = [Program(model, label, d, timed * len(d)) for d in groups]
        self.checked = []
        if arguments.check_steps:
            # Without TF32, so that float32 means float32.
            with jax.default_matmul_precision("highest"):
                size = checked * len(devices)
                self.checked = [
                    Program(model, f"{label}, check", d, size) for d in groups
                ]

    @property
    def memory(self):
        """GiB on the first device: what both hold, and the larger need beside it."""
        return sum(p.held for p in self.timed) + max(p.used for p in self.timed)

    def check(self, steps):
        """Returns the losses of the first steps, of one device and of all."""
        if not self.checked:
            return None
        batches = make_batches(self.model, self.checked[0].batch_size, min(steps, 4))
        losses = [p.first_losses(self.state, batches, steps) for p in self.checked]
        self.checked = []
        return losses

    def time(self, arguments):
        """Returns examples a second of each turn, of one device and of all."""
        for program in self.timed:
            batch = make_batches(self.model, program.batch_size, 1)[0]
            program.place(self.state, batch)
            program.run(arguments.warmup)
        rates = [[] for _ in self.timed]
        for turn in range(arguments.repeats):
            # Every other round goes backwards, as in `common.time_in_turns`.
            order = list(zip(self.timed, rates))
            for program, values in order[::-1] if turn % 2 else order:
                seconds = program.run(arguments.steps)
                values.append(arguments.steps * program.batch_size / seconds)
                log(f"{program.label}: {values[-1]:.1f} examples/s")
        return rates


def compiled_pairs(arguments, devices):
    """Yields the pairs that can be compiled, each before the next one is begun."""
    import jax

    for name in arguments.models:
        for precision in arguments.precisions:
            pair = Pair(name, precision, devices, arguments)
            try:
                for program in pair.timed + pair.checked:
                    program.compile()
            except jax.errors.JaxRuntimeError as error:
                # The others are worth their time on the machine.
                log(f"{name}, {precision}: does not compile: {error}")
            else:
                yield pair


def rows_of(pair, rates, losses):
    import numpy as np

    medians = [float(np.median(values)) for values in rates]
    difference = "not checked in this run"
    if losses is not None:
        one, many = np.array(losses)
        difference = f"{np.max(np.abs(many - one) / np.abs(one)):.1e}"
    return [
        {
            "model": pair.name,
            "precision": pair.precision,
            "devices": devices,
            "batch": program.batch_size,
            "examples/s": f"{median:.1f}",
            "fastest, slowest": f"{max(values):.1f}, {min(values):.1f}",
            "times one device": f"{median / medians[0]:.3f}",
            "all-reduces": program.all_reduces,
            "loss difference": "" if devices == 1 else difference,
        }
        for program, devices, values, median in zip(
            pair.timed, (1, pair.timed[1].shared.num_devices), rates, medians
        )
    ]


def main(arguments):
    if arguments.virtual_cpus:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "")
            + f" --xla_force_host_platform_device_count={arguments.virtual_cpus}"
        )
    import jax
    from common import RESULTS, write_results

    devices = jax.devices()
    if len(devices) < 2:
        raise SystemExit(f"Needs two or more GPUs, or --virtual-cpus. Found: {devices}")
    # Where the files go says nothing of what was measured.
    recorded = {k: v for k, v in vars(arguments).items() if k != "folder"}
    rows, data, failed = [], {"arguments": recorded, "runs": []}, []
    for pair in compiled_pairs(arguments, devices):
        label = f"{pair.name}, {pair.precision}"
        if pair.memory > arguments.memory_limit:
            log(
                f"{label}: skipped, needs {pair.memory:.1f} GiB, more than "
                f"--memory-limit {arguments.memory_limit:g}"
            )
            continue
        try:
            losses = pair.check(arguments.check_steps)
            rates = pair.time(arguments)
        except jax.errors.JaxRuntimeError as error:
            # Out of memory, mostly: the next one may fit.
            log(f"{label}: {error}")
            failed.append(label)
            continue
        finally:
            programs, pair.state = pair.timed, None
            for program in programs:
                program.state = program.batch = None
        rows += rows_of(pair, rates, losses)
        data["runs"].append(
            {
                "model": pair.name,
                "precision": pair.precision,
                "examples_per_second": {
                    program.label: values for program, values in zip(programs, rates)
                },
                "losses": losses,
                "compile_seconds": [program.seconds for program in programs],
                "gib_of_memory": [program.held + program.used for program in programs],
            }
        )
        write_results(
            arguments.output,
            f"Training on one and on {len(devices)} devices, jax",
            rows,
            notes=(
                "vit: ViT-B/16 with TokenLearner at 224; video: X(2+1)D-M with "
                f"TokenLearner, {arguments.num_frames} x 224 x 224.",
                "Keras's training step with XLA, AdamW; synthetic examples that lie on "
                f"the devices; medians of {arguments.repeats} turns of "
                f"{arguments.steps} steps. XLA_FLAGS: "
                f"`{os.environ.get('XLA_FLAGS', '').strip() or 'none'}`.",
                "BatchNormalization normalises by the batch of all devices. "
                "all-reduces: how many the compiled step has.",
                "loss difference: the largest relative difference to one device over "
                f"the first {arguments.check_steps or 'few'} steps on the same global "
                "batches (TF32 off).",
            ),
            data=data,
            folder=arguments.folder or RESULTS,
        )
        del programs
        gc.collect()
    if failed or not rows:
        raise SystemExit(f"Not timed: {failed or 'all'}")


def log(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def parse(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["vit", "video"])
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS
    )
    parser.add_argument("--batch-size", type=int, help="of one device, for all models")
    parser.add_argument("--num-frames", type=int, default=64)
    parser.add_argument("--check-steps", type=int, default=4, help="0: no comparison")
    parser.add_argument("--steps", type=int, default=20, help="of a timed turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps")
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--memory-limit", type=float, default=130, help="GiB a device")
    parser.add_argument("--virtual-cpus", type=int, default=0)
    parser.add_argument("--output", default="distributed_jax", help="name of the files")
    parser.add_argument("--folder", help="of the result files")
    return parser.parse_args(args)


if __name__ == "__main__":
    main(parse())
