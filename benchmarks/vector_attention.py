"""Times every method of vector attention, side by side.

    KERAS_BACKEND=tensorflow python benchmarks/vector_attention.py --name cpu
    KERAS_BACKEND=jax python benchmarks/vector_attention.py --name h100 --batch 8

Each case (method, forward or forward and backward, number of tokens) is compiled with
XLA, run once, and then timed until `--seconds` are over; the table has the median.
Memory is what the compiled program allocates for temporaries, as XLA plans it (JAX), or
the growth of the peak of the GPU, or of the process on a CPU, in one call of the
compiled program, its outputs included and compilation not (TensorFlow). A case
whose predecessor (half as many tokens) took so long that it would take more than
`--limit` seconds is left out, as is the dense method beyond `--dense-limit` bytes.
Results go to benchmarks/results/vector_attention_<name>.{json,md,png}.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# The allocator that TensorFlow takes with oneDNN keeps what is freed, so that no peak
# of a single call could be seen.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
METHODS = ("auto", "interpolated", "streaming", "dense")
PASSES = ("forward", "forward+backward")


def build(backend, method, backward, rounds):
    """Returns a compiled function of (query, key, value, upstream), and a waiter.

    With several `rounds` the program does its work so many times, each on tensors that
    depend on the round before, so that no part of it can be done once for all.
    """
    from tokenlearner_keras.ops import vector_attention

    def forward(q, k, v):
        return vector_attention(q, k, v, method=method)

    if backend == "jax":
        import jax

        def both(q, k, v, g):
            output, pullback = jax.vjp(forward, q, k, v)
            return output, *pullback(g)

    else:
        import tensorflow as tf

        def both(q, k, v, g):
            with tf.GradientTape() as tape:
                tape.watch((q, k, v))
                output = forward(q, k, v)
            return output, *tape.gradient(output, (q, k, v), g)

    def once(q, k, v, g):
        return both(q, k, v, g) if backward else (forward(q, k, v),)

    def run(q, k, v, g):
        if rounds == 1:
            return once(q, k, v, g)

        def body(index, inputs, *_):
            results = once(*inputs)
            # All results are carried, so that none is left out.
            inputs = tuple(x + 1e-3 * results[0] for x in inputs)
            return index + 1, inputs, *results

        carry = (q, k, v, g), q, *((q, k, v) if backward else ())
        if backend == "jax":
            carry = jax.lax.fori_loop(0, rounds, lambda i, c: body(i, *c)[1:], carry)
        else:
            carry = tf.while_loop(
                lambda index, *_: index < rounds,
                body,
                (tf.constant(0), *carry),
                maximum_iterations=rounds,
            )[1:]
        return carry[1:]

    if backend == "jax":
        return jax.jit(run), jax.block_until_ready
    on_gpu = bool(tf.config.list_physical_devices("GPU"))

    def wait(outputs):
        # One number is enough: the program is one. On a CPU a function returns when its
        # work is done.
        if on_gpu:
            tf.nest.flatten(outputs)[0][0, 0, 0].numpy()

    return tf.function(run, jit_compile=True), wait


def gpu_memory_of_a_call(call):
    """Bytes by which one call raises what TensorFlow takes of the GPU."""
    import tensorflow as tf

    experimental = tf.config.experimental
    experimental.reset_memory_stats("GPU:0")  # peak := now
    before = experimental.get_memory_info("GPU:0")["peak"]
    call()
    return experimental.get_memory_info("GPU:0")["peak"] - before


def memory_of_a_call(call):
    """Bytes by which one call raises this process's memory (Linux, glibc)."""
    import ctypes

    def read(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(x.split()[1]) for x in lines if x.startswith(name))

    libc = ctypes.CDLL("libc.so.6")
    # What is freed goes back at once, else the second call finds it allocated.
    libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    call()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # peak := now
    before = read("VmRSS")
    call()
    return read("VmHWM") - before


def device_name(backend):
    if backend == "jax":
        import jax

        device = jax.devices()[0]
        if device.platform == "gpu":
            return device.device_kind, True
    else:
        import tensorflow as tf

        for device in tf.config.list_physical_devices("GPU"):
            details = tf.config.experimental.get_device_details(device)
            return details.get("device_name", "GPU"), True
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if "model name" in x]
        model = names[0].split(":")[1].strip() if names else model
    return f"{os.cpu_count()} CPU cores ({model})", False


def run_case(options):
    """Runs one case in this process and returns its figures."""
    import keras
    import numpy as np

    backend = keras.backend.backend()
    name, on_gpu = device_name(backend)
    rng = np.random.default_rng(0)
    shape = (options.batch, options.tokens, options.channels)
    sets = []
    for _ in range(3 if on_gpu else 1):
        arrays = [rng.standard_normal(shape).astype("float32") for _ in range(4)]
        sets.append([keras.ops.convert_to_tensor(a) for a in arrays])
    run, wait = build(backend, options.method, options.backward, options.rounds)
    start = time.perf_counter()
    if backend == "jax":
        run = run.lower(*sets[0]).compile()
    wait(run(*sets[0]))
    compile_seconds = time.perf_counter() - start
    times, begin = [], time.perf_counter()
    calls = max(1, 20 // options.rounds) if on_gpu else 1
    while time.perf_counter() - begin < options.seconds or len(times) < 3:
        start = time.perf_counter()
        for i in range(calls):
            outputs = run(*sets[i % len(sets)])
        wait(outputs)
        times.append((time.perf_counter() - start) / calls / options.rounds)
    if backend == "jax":
        temporary = run.memory_analysis().temp_size_in_bytes
    else:
        measure = gpu_memory_of_a_call if on_gpu else memory_of_a_call
        temporary = measure(lambda: wait(run(*sets[0])))
    return {
        "device": name,
        "backend": backend,
        "keras": keras.__version__,
        "milliseconds": 1e3 * statistics.median(times),
        "fastest": 1e3 * min(times),
        "compile_seconds": compile_seconds,
        "temporary_mib": temporary / 2**20,
    }


def run_all(options):
    import keras  # noqa: F401  (fails early without a backend)

    rows = []
    for method in options.methods:
        for backward in (False, True):
            last = None
            for tokens in options.sizes:
                pair_bytes = 4 * options.batch * tokens**2 * options.channels
                if method == "dense" and 3 * pair_bytes > options.dense_limit:
                    continue
                if last and 4 * last * 3 > 1e3 * options.limit:
                    continue
                case = argparse.Namespace(
                    **vars(options),
                )
                case.method, case.backward, case.tokens = method, backward, tokens
                try:
                    result = run_case(case) if options.in_process else spawn(case)
                except Exception as error:  # reported, and the next method goes on
                    print(method, tokens, "failed:", repr(error)[:200], flush=True)
                    break
                last = result["milliseconds"]
                row = {
                    "method": method,
                    "pass": PASSES[backward],
                    "tokens": tokens,
                    **result,
                }
                rows.append(row)
                print(
                    f"{method:13s} {row['pass']:17s} {tokens:5d} {last:10.3f} ms",
                    flush=True,
                )
                write(rows, options)


def spawn(case):
    """Runs one case in a process of its own, so that its peak memory is its own."""
    command = [
        *(sys.executable, __file__, "--case", "--method", case.method),
        *("--tokens", str(case.tokens), "--batch", str(case.batch)),
        *("--channels", str(case.channels), "--seconds", str(case.seconds)),
        *("--rounds", str(case.rounds)),
    ]
    command += ["--backward"] if case.backward else []
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=case.limit + 120
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise RuntimeError(done.stderr[-200:])


def write(rows, options):
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"vector_attention_{options.name}"
    stem.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        f"# Vector attention on {rows[0]['device']}",
        "",
        f"Backend {rows[0]['backend']}, XLA, float32, batch {options.batch}, "
        f"{options.channels} channels, q, k and v ~ N(0, 1). Median milliseconds "
        "(fastest in parentheses), MiB of temporaries, seconds of the first call.",
        "",
    ]
    if options.rounds > 1:
        lines += [
            f"Each program has {options.rounds} calls, one after the other, in a loop; "
            "times are those of one.",
            "",
        ]
    if options.note:
        lines += [options.note, ""]
    lines += [
        "| method | pass | tokens | ms | MiB | first call, s |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['method']} | {r['pass']} | {r['tokens']} | {r['milliseconds']:.3g} "
            f"({r['fastest']:.3g}) | {r['temporary_mib']:.1f} | "
            f"{r['compile_seconds']:.1f} |"
        )
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    plot(rows, stem.with_suffix(".png"))


def plot(rows, path):
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    for axis, key, label in (
        (axes[0], "milliseconds", "time, ms"),
        (axes[1], "temporary_mib", "temporary memory, MiB"),
    ):
        for index, method in enumerate(METHODS):
            for name, style in zip(PASSES, ("-o", "--s")):
                points = [
                    (r["tokens"], r[key])
                    for r in rows
                    if (r["method"], r["pass"]) == (method, name) and r[key] > 0
                ]
                if points:
                    axis.loglog(
                        *zip(*points),
                        style,
                        color=f"C{index}",
                        label=f"{method}, {name}",
                    )
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(f"Vector attention, {rows[0]['device']}, {rows[0]['backend']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="local", help="name of the result files")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--channels", type=int, default=432)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        help="calls inside each program: leaves out what Python takes to start one",
    )
    parser.add_argument("--limit", type=float, default=60.0)
    parser.add_argument("--dense-limit", type=float, default=8e9)
    parser.add_argument("--note", default="", help="a sentence for the table")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[64, 256, 512, 1024, 2048, 4096]
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="all cases in one process: faster, but not for peaks of memory on a CPU",
    )
    parser.add_argument("--case", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print("RESULT " + json.dumps(run_case(options)))
    else:
        run_all(options)


if __name__ == "__main__":
    main()
