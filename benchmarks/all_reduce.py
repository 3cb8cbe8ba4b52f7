"""How long TensorFlow takes to sum a ViT-B's gradients over the GPUs of one machine.

    python benchmarks/all_reduce.py

Without a model: 340 MB of zeros as 144 tensors, as `MirroredStrategy` sums them by
default, in packs, as one tensor, and by its other ways; beside a plain copy between two
GPUs. Writes benchmarks/results/all_reduce.md and .json.

`--virtual-cpus 2` tries the script without a GPU, on tensors of a thousandth.
"""

import argparse
import time

from common import write_results

BLOCK = [(768, 3072), (3072, 768)] + [(768, 768)] * 4 + [(768,)] * 6
SHAPES = BLOCK * 12


def num_elements(shapes):
    import numpy as np

    return sum(int(np.prod(shape)) for shape in shapes)


def milliseconds(function, repeats):
    """Mean time of a call; `function` returns small tensors that depend on its work."""

    def wait(tensors):
        for tensor in tensors:
            tensor.numpy()

    for _ in range(3):
        tensors = function()
    wait(tensors)
    start = time.perf_counter()
    for _ in range(repeats):
        tensors = function()
    wait(tensors)
    return 1e3 * (time.perf_counter() - start) / repeats


def copy_time(devices, shapes, repeats):
    import tensorflow as tf

    with tf.device(devices[0]):
        source = tf.zeros((num_elements(shapes),))

    @tf.function
    def copy(tensor):
        with tf.device(devices[1]):
            return [tf.identity(tensor)[-1:]]

    return milliseconds(lambda: copy(source), repeats)


def sum_time(strategy, devices, shapes, options, repeats):
    import tensorflow as tf

    values = []
    for device in devices:
        with tf.device(device):
            values.append([tf.zeros(shape) for shape in shapes])

    @tf.function
    def sum_all(values):
        def replica():
            context = tf.distribute.get_replica_context()
            index = int(tf.get_static_value(context.replica_id_in_sync_group))
            sums = context.all_reduce("SUM", values[index], options)
            return tf.add_n([tf.reshape(value, [-1])[:1] for value in sums])

        return strategy.experimental_local_results(strategy.run(replica))

    return milliseconds(lambda: sum_all(values), repeats)


def main(arguments):
    import tensorflow as tf

    shapes = SHAPES
    if arguments.virtual_cpus:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * arguments.virtual_cpus
        )
        devices = [f"CPU:{index}" for index in range(arguments.virtual_cpus)]
        shapes = [(max(shape[0] // 1000, 1), *shape[1:]) for shape in SHAPES]
    else:
        gpus = tf.config.list_physical_devices("GPU")
        devices = [f"GPU:{index}" for index in range(len(gpus))]
    if len(devices) < 2:
        raise SystemExit(f"Needs two or more GPUs, or --virtual-cpus. Found: {devices}")
    # One strategy for all that uses collectives: two would share their keys.
    default = tf.distribute.MirroredStrategy(devices)

    def other(operations):
        return tf.distribute.MirroredStrategy(devices, operations)

    packs = tf.distribute.experimental.CommunicationOptions(bytes_per_pack=50_000_000)
    flat = [(num_elements(shapes),)]
    cases = {
        "144 tensors, by default": (default, shapes, None),
        "144 tensors, in packs of 50 MB": (default, shapes, packs),
        "one tensor": (default, flat, None),
        "144 tensors, HierarchicalCopyAllReduce": (
            other(tf.distribute.HierarchicalCopyAllReduce(1)),
            shapes,
            None,
        ),
        "144 tensors, ReductionToOneDevice": (
            other(tf.distribute.ReductionToOneDevice()),
            shapes,
            None,
        ),
    }
    results = {"a copy to another device": copy_time(devices, flat, arguments.repeats)}
    for name, (strategy, tensors, options) in cases.items():
        results[name] = sum_time(strategy, devices, tensors, options, arguments.repeats)
    gigabytes = 4 * num_elements(shapes) / 1e9
    rows = [
        {"what": name, "ms": f"{ms:.2f}", "GB/s": f"{1e3 * gigabytes / ms:.0f}"}
        for name, ms in results.items()
    ]
    write_results(
        arguments.output,
        f"Sums of {1e3 * gigabytes:.0f} MB over {len(devices)} devices",
        rows,
        notes=(f"Means of {arguments.repeats} calls.",),
        data=results,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--virtual-cpus", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", default="all_reduce")
    main(parser.parse_args())
