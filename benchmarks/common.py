"""What the benchmarks share: timing in turns, the machine's name, result files."""

import importlib.metadata
import json
import os
import platform
import re
import statistics
import time
from pathlib import Path

import plots

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "jax", "torch", "numpy")


def time_in_turns(functions, repeats=5, warmup=1):
    """Returns, by name, the seconds of each call; the functions take turns.

    Turns make a comparison hold on a machine whose speed drifts: every function meets
    the same slow and fast moments. Every other round goes backwards, because a call
    also meets what the one before it left in caches and threads.

    Args:
        functions: Dictionary from names to functions without arguments, which return
            after their work is done.
        repeats: int. Timed calls of each function.
        warmup: int. Calls of each function before those.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    seconds = {name: [] for name in functions}
    for index in range(repeats):
        turns = list(functions.items())
        for name, function in turns[::-1] if index % 2 else turns:
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def training_step(model, loss_fn, inputs, labels, jit=True):
    """Returns a function that trains `model` once on a batch that stays on the device.

    SGD with momentum. The function returns the loss, which it does not wait for. On JAX
    it is compiled here, and has JAX's executable as its attribute `compiled`; on
    TensorFlow it is compiled by the first call.
    """
    import keras

    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(model.trainable_variables)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=jit)
        def train(inputs, labels):
            with tf.GradientTape() as tape:
                loss = loss_fn(labels, model(inputs, training=True))
            variables = model.trainable_variables
            optimizer.apply(tape.gradient(loss, variables), variables)
            return loss

        return lambda: train(inputs, labels)

    if keras.backend.backend() != "jax":
        raise SystemExit("This benchmark runs on the TensorFlow and JAX backends.")
    import jax

    def compute_loss(trainable, others, inputs, labels):
        outputs, others = model.stateless_call(trainable, others, inputs, training=True)
        return loss_fn(labels, outputs), others

    def train(trainable, others, state, inputs, labels):
        (loss, others), gradients = jax.value_and_grad(compute_loss, has_aux=True)(
            trainable, others, inputs, labels
        )
        trainable, state = optimizer.stateless_apply(state, gradients, trainable)
        return loss, (trainable, others, state)

    # Copies: the buffers are given to each step, and Keras keeps its own.
    values = [
        [jax.numpy.array(variable.value) for variable in variables]
        for variables in (
            model.trainable_variables,
            model.non_trainable_variables,
            optimizer.variables,
        )
    ]
    if jit:
        train = jax.jit(train, donate_argnums=(0, 1, 2))
        train = train.lower(*values, inputs, labels).compile()

    def step():
        # The batch is an argument: as a constant, XLA would fold it while compiling.
        loss, values[:] = train(*values, inputs, labels)
        return loss

    if jit:
        step.compiled = train
    return step


def inference_step(model, inputs, jit=True, in_sequence=False):
    """Returns a function that calls `model` on a batch that stays on the device.

    Compiled as by `training_step`. With `in_sequence`, `inputs` has several batches,
    which one program takes one after the other: what it takes to start a program from
    Python is then left out.
    """
    import keras

    def run(call, inputs):
        return keras.ops.map(call, inputs) if in_sequence else call(inputs)

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        call = tf.function(
            lambda x: run(lambda x: model(x, training=False), x), jit_compile=jit
        )
        return lambda: call(inputs)

    if keras.backend.backend() != "jax":
        raise SystemExit("This benchmark runs on the TensorFlow and JAX backends.")
    import jax

    def call(trainable, others, inputs):
        return run(
            lambda x: model.stateless_call(trainable, others, x, training=False)[0],
            inputs,
        )

    values = [
        [variable.value for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    ]
    if jit:
        call = jax.jit(call).lower(*values, inputs).compile()

    def step():
        return call(*values, inputs)

    if jit:
        step.compiled = call
    return step


def program_bytes(compiled):
    """Returns the bytes on a device of one of JAX's executables, by XLA's account."""
    memory = compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        # What a step is given and overwrites is input and output at once.
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def count_collective(compiled, kind="all-reduce"):
    """Returns how many collectives of a kind one of JAX's executables has."""
    return len(re.findall(rf" {kind}(?:-start)?\(", compiled.as_text()))


def repeated(step, count):
    """Returns a function that runs `step` `count` times and waits for the last."""
    import keras

    def run():
        for _ in range(count):
            result = step()
        keras.ops.convert_to_numpy(result)

    return run


def median(seconds):
    return statistics.median(seconds)


def machine():
    """Returns what a reader needs to know of the machine and the software."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": _gpu_name()
        or f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        **versions,
    }


def markdown_table(rows):
    """Returns a Markdown table of dictionaries with the same keys."""
    header = list(rows[0])
    lines = [header, ["---"] * len(header), *[[row[k] for k in header] for row in rows]]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_results(name, title, rows, notes=(), data=None, folder=RESULTS):
    """Writes `name.md` (a table and notes), `name.json` and, where `plots` knows how,
    `name.png`, and prints the table."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = machine()
    text = [f"# {title}", "", markdown_table(rows), ""]
    text += [f"- {note}" for note in notes]
    text += ["- " + ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    for path, content in (
        (folder / f"{name}.md", "\n".join(text)),
        (
            folder / f"{name}.json",
            json.dumps({"machine": about, "rows": rows, "data": data}, indent=1) + "\n",
        ),
    ):
        beside = path.with_suffix(path.suffix + ".part")
        beside.write_text(content)
        os.replace(beside, path)
    print("\n".join(text))
    try:
        plots.draw(name, title, rows, folder)
    except ImportError:
        print("No plot: matplotlib is missing. `python benchmarks/plots.py` draws it.")


def _processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpu_name():
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        names = [
            tf.config.experimental.get_device_details(g)["device_name"] for g in gpus
        ]
    elif keras.backend.backend() == "jax":
        import jax

        names = [d.device_kind for d in jax.devices() if d.platform == "gpu"]
    else:
        import torch

        count = torch.cuda.device_count()
        names = [torch.cuda.get_device_name(index) for index in range(count)]
    return f"{len(names)} x {names[0]}" if names else None
