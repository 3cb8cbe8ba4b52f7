import json
import os
from collections.abc import Sequence
from typing import Any

import keras

from tokenlearner_keras.layers._checks import check_choice

STRATEGIES = ("auto", "cpu", "one_device", "mirrored", "multi_worker", "tpu")
_MIRRORED = {}  # the `MirroredStrategy` of each tuple of devices


def get_strategy(
    name: str = "auto",
    devices: Sequence[str] | None = None,
    tpu: str | None = None,
    zone: str | None = None,
    project: str | None = None,
    verbose: bool = True,
) -> Any:
    """Returns a way to train on the devices that are there.

    On TensorFlow this is a `tf.distribute.Strategy`; on JAX a
    `keras.distribution.DataParallel`, which is also set as the global distribution.
    Both have a `scope()`: make and compile the model inside of it. On TensorFlow, pass
    the model through `tokenlearner_keras.training.distributed` as well.

    - `"cpu"`: the first CPU.
    - `"one_device"`: the first GPU, else the first CPU (on JAX the first device).
    - `"mirrored"`: all GPUs of this machine, or `devices`.
    - `"multi_worker"`: all GPUs (else the CPU) of each machine in `TF_CONFIG`; on JAX
      all devices of all processes, see `keras.distribution.initialize`.
    - `"tpu"`: the TPU called `tpu`, or the one of this machine.
    - `"auto"`: the first that is there of: several workers in `TF_CONFIG` (on JAX
      `KERAS_DISTRIBUTION_JOB_ADDRESSES`), a TPU, several GPUs, one GPU, the CPU.

    Call it before any other use of the devices: several workers and TPUs can only be
    connected to a fresh runtime.

    Args:
        name: One of the names above.
        devices: Device names such as `["GPU:0", "GPU:1"]`, for `"mirrored"` only.
        tpu: Name or gRPC address of a TPU, or `"local"` for the TPU of this machine.
            Defaults to the environment variable `TPU_NAME`, if set.
        zone: Cloud zone of `tpu`. `None` takes the zone of this machine.
        project: Cloud project of `tpu`. `None` takes the project of this machine.
        verbose: Whether to print what was chosen.

    Returns:
        A `tf.distribute.Strategy` or a `keras.distribution.DataParallel`. The same
        devices give the same `MirroredStrategy` each time.

    Raises:
        ValueError: if the devices that were asked for are not there, if `TF_CONFIG` is
            not valid, or on a backend that cannot distribute.
    """
    check_choice("name", name, STRATEGIES)
    if devices is not None and name != "mirrored":
        raise ValueError(
            "Argument `devices` can only be given with name='mirrored'. "
            f"Received: name={name!r}, devices={devices}"
        )
    backend = keras.backend.backend()
    if backend == "tensorflow":
        strategy, chosen = _tensorflow_strategy(name, devices, tpu, zone, project)
        _rewrite_datasets(strategy)
    elif backend == "jax":
        strategy, chosen = _jax_distribution(name, devices)
    else:
        raise ValueError(
            "`get_strategy` needs the TensorFlow or the JAX backend of Keras. "
            f"Received: backend={backend!r}"
        )
    if verbose:
        print(f"Strategy {name!r}: {chosen}", flush=True)
    return strategy


def _tensorflow_strategy(name, devices, tpu, zone, project):
    import tensorflow as tf

    tpu = tpu or os.environ.get("TPU_NAME")
    # Before the logical devices are listed, which starts the runtime: workers and TPUs
    # can only be connected to one that has not started.
    if name == "multi_worker" or (name == "auto" and _num_workers() > 1):
        return _multi_worker_strategy()
    has_tpu = tpu or tf.config.list_physical_devices("TPU")
    if name == "tpu" or (name == "auto" and has_tpu):
        return _tpu_strategy(tpu, zone, project)
    gpus = [f"GPU:{i}" for i, _ in enumerate(tf.config.list_logical_devices("GPU"))]
    if name == "auto":
        name = "mirrored" if len(gpus) > 1 else "one_device"
    if name == "mirrored":
        return _mirrored_strategy(devices, gpus)
    device = gpus[0] if gpus and name == "one_device" else "CPU:0"
    return tf.distribute.OneDeviceStrategy(device), f"OneDeviceStrategy on {device}"


def _rewrite_datasets(strategy):
    """Has TensorFlow rewrite each dataset that it shares out, also those of arrays.

    What a rewriting makes belongs to the thread that reads ahead. A dataset that is not
    rewritten, as Keras asks for arrays, belongs to the iterator, which on its deletion
    lets go of it before it stops the thread: from time to time TensorFlow crashes.
    """
    import tensorflow as tf

    # Of the class: the strategy may have come through here before.
    distribute = type(strategy).experimental_distribute_dataset
    rewriting = tf.data.Options()
    rewriting.experimental_optimization.noop_elimination = True

    def distribute_rewritten(dataset, options=None):
        return distribute(strategy, dataset.with_options(rewriting), options)

    strategy.experimental_distribute_dataset = distribute_rewritten


def _mirrored_strategy(devices, gpus):
    import tensorflow as tf

    there = {
        f"{device.device_type}:{device.name.rpartition(':')[2]}"
        for device in tf.config.list_logical_devices()
    }
    if devices is None:
        devices = gpus
    # "/device:GPU:0", "/gpu:0" and "GPU:0" are one device.
    short = [":".join(d.upper().split(":")[-2:]).lstrip("/") for d in devices]
    missing = [device for device in short if device not in there]
    if not devices or missing:
        raise ValueError(
            "Strategy 'mirrored' needs devices that are there: by default all GPUs, "
            f"else those in `devices`. Received: devices={list(devices)}; there are "
            f"{sorted(there)}"
        )
    # Two strategies over the same devices in one process would give different sums the
    # same key, and TensorFlow refuses the second model that trains.
    key = tuple(short)
    if key not in _MIRRORED:
        _MIRRORED[key] = tf.distribute.MirroredStrategy(list(devices))
    strategy = _MIRRORED[key]
    return strategy, f"MirroredStrategy on {len(devices)} devices, {list(devices)}"


def _tf_config():
    """The parsed environment variable `TF_CONFIG`, empty if it is not set."""
    text = os.environ.get("TF_CONFIG", "").strip()
    try:
        config = json.loads(text) if text else {}
        if config:
            workers = _worker_addresses(config)
            kind, index = config["task"]["type"], int(config["task"]["index"])
            if kind not in ("chief", "worker") or index >= len(workers):
                raise ValueError(f"no task {kind}:{index} in the cluster")
        return config
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            "The environment variable `TF_CONFIG` must be JSON such as "
            '{"cluster": {"worker": ["host0:12345", "host1:12345"]}, '
            '"task": {"type": "worker", "index": 0}}. '
            f"Received: TF_CONFIG={text!r} ({type(error).__name__}: {error})"
        ) from error


def _worker_addresses(config):
    cluster = config["cluster"]
    return [*cluster.get("chief", ()), *cluster.get("worker", ())]


def _num_workers():
    config = _tf_config()
    return len(_worker_addresses(config)) if config else 0


def _multi_worker_strategy():
    import tensorflow as tf

    config = _tf_config()
    if not config:
        raise ValueError(
            "Strategy 'multi_worker' needs the environment variable `TF_CONFIG` on "
            "each worker: the addresses of all workers and the index of this one. "
            "Received: TF_CONFIG is not set"
        )
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    task = config["task"]
    return strategy, (
        f"MultiWorkerMirroredStrategy, {task['type']} {task['index']} of "
        f"{len(_worker_addresses(config))} workers, "
        f"{strategy.num_replicas_in_sync} replicas in all"
    )


def _tpu_strategy(tpu, zone, project):
    import tensorflow as tf

    if not tpu and not tf.config.list_physical_devices("TPU"):
        raise ValueError(
            "Strategy 'tpu' needs a TPU: on this machine, or one that is named by "
            "`tpu` (or the environment variable `TPU_NAME`). "
            f"Received: tpu={tpu!r}; this machine has no TPU that TensorFlow sees"
        )
    try:
        # Connects, and initialises the TPU system, which clears its memory.
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(
            tpu=tpu or "local", zone=zone, project=project
        )
    except Exception as error:
        raise ValueError(
            "Strategy 'tpu' cannot reach its TPU. "
            f"Received: tpu={tpu!r}, zone={zone!r}, project={project!r} "
            f"({type(error).__name__}: {error})"
        ) from error
    strategy = tf.distribute.TPUStrategy(resolver)
    return strategy, (
        f"TPUStrategy on {tpu or 'local'}, {strategy.num_replicas_in_sync} cores"
    )


def _jax_distribution(name, devices):
    several = bool(os.environ.get("KERAS_DISTRIBUTION_JOB_ADDRESSES"))
    if name == "multi_worker" or (name == "auto" and several):
        if not several:
            raise ValueError(
                "Strategy 'multi_worker' on JAX needs the environment variables of "
                "`keras.distribution.initialize` on each process. "
                "Received: KERAS_DISTRIBUTION_JOB_ADDRESSES is not set"
            )
        keras.distribution.initialize()
        devices = keras.distribution.list_devices()
    elif name == "auto":
        devices = keras.distribution.list_devices()
    elif name == "one_device":
        devices = keras.distribution.list_devices()[:1]
    elif devices is None:
        kind = {"mirrored": "gpu", "cpu": "cpu", "tpu": "tpu"}[name]
        devices = _jax_devices(name, kind)
        if name == "cpu":
            devices = devices[:1]
    else:
        there = keras.distribution.list_devices()
        kinds = {device.rpartition(":")[0].lower() for device in devices}
        for kind in sorted(kinds):
            there = [*there, *_jax_devices(name, kind)]
        devices = [device.lower() for device in devices]
        missing = [device for device in devices if device not in there]
        if missing:
            raise ValueError(
                "Strategy 'mirrored' needs devices that are there. "
                f"Received: devices={devices}; there are {sorted(set(there))}"
            )
    distribution = keras.distribution.DataParallel(devices=list(devices))
    keras.distribution.set_distribution(distribution)
    return distribution, f"DataParallel on {len(devices)} devices, {list(devices)}"


def _jax_devices(name, kind):
    try:
        return keras.distribution.list_devices(kind)
    except RuntimeError as error:
        raise ValueError(
            f"Strategy {name!r} needs a device of type {kind!r}. Received: JAX has "
            f"{keras.distribution.list_devices()}"
        ) from error
