import json
import os
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

from tokenlearner_keras.training import get_strategy

pytestmark = pytest.mark.tensorflow


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in ("TF_CONFIG", "TPU_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["auto", "cpu", "one_device"])
def test_one_device(name, capsys):
    import tensorflow as tf

    strategy = get_strategy(name)
    assert isinstance(strategy, tf.distribute.OneDeviceStrategy)
    assert capsys.readouterr().out == (
        f"Strategy '{name}': OneDeviceStrategy on CPU:0\n"
    )
    get_strategy(name, verbose=False)
    assert capsys.readouterr().out == ""


def test_mirrored():
    import tensorflow as tf

    strategy = get_strategy("mirrored", devices=["CPU:0"])
    assert isinstance(strategy, tf.distribute.MirroredStrategy)
    assert strategy.num_replicas_in_sync == 1


@pytest.mark.parametrize("arguments", [["cpu"], ["mirrored", ["CPU:0"]]])
def test_datasets_of_arrays_are_rewritten(arguments):
    """Else TensorFlow crashes now and then, when an iterator over them is deleted."""
    import tensorflow as tf

    off = tf.data.Options()
    off.experimental_optimization.apply_default_optimizations = False
    dataset = tf.data.Dataset.range(8).batch(2).with_options(off)  # as Keras's arrays
    for _ in range(2):  # the second time it may be the same strategy
        strategy = get_strategy(*arguments)
        shared_out = strategy.experimental_distribute_dataset(dataset)
        assert [batch.numpy().tolist() for batch in shared_out] == [
            [0, 1],
            [2, 3],
            [4, 5],
            [6, 7],
        ]
        optimization = shared_out._original_dataset.options().experimental_optimization
        assert optimization.noop_elimination
        assert optimization.apply_default_optimizations is False


def test_missing_devices():
    with pytest.raises(ValueError, match=r"'mirrored' needs devices.*there are.*CPU:0"):
        get_strategy("mirrored")
    with pytest.raises(ValueError, match=r"Received: devices=\['GPU:7'\]"):
        get_strategy("mirrored", devices=["GPU:7"])
    with pytest.raises(ValueError, match=r"'tpu' needs a TPU.*no TPU that TensorFlow"):
        get_strategy("tpu")
    with pytest.raises(ValueError, match="tpu='local'"):
        get_strategy("tpu", tpu="local")
    with pytest.raises(ValueError, match="TF_CONFIG is not set"):
        get_strategy("multi_worker")


def test_misuse():
    with pytest.raises(ValueError, match=r"argument `name`.*Received: name='gpu'"):
        get_strategy("gpu")
    with pytest.raises(ValueError, match="only be given with name='mirrored'"):
        get_strategy("auto", devices=["CPU:0"])


@pytest.mark.parametrize(
    "config",
    [
        "{not json",
        json.dumps({"cluster": {"worker": ["a:1"]}}),
        json.dumps(
            {
                "cluster": {"worker": ["a:1"]},
                "task": {"type": "worker", "index": 1},
            }
        ),
    ],
)
def test_invalid_tf_config(config, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config)
    for name in ("auto", "multi_worker"):
        with pytest.raises(ValueError, match=r"`TF_CONFIG` must be JSON.*Received"):
            get_strategy(name)


def test_tpu_is_connected_as_tensorflow_documents(monkeypatch):
    """Up to the point where a TPU is needed."""
    import tensorflow as tf

    calls = []
    resolver_class = tf.distribute.cluster_resolver.TPUClusterResolver

    def connect(**kwargs):
        calls.append(kwargs)
        raise tf.errors.NotFoundError(None, None, "no such TPU")

    monkeypatch.setattr(resolver_class, "connect", connect)
    with pytest.raises(
        ValueError, match=r"cannot reach its TPU.*'my-tpu'.*no such TPU"
    ):
        get_strategy("tpu", tpu="my-tpu", zone="z", project="p")
    monkeypatch.setenv("TPU_NAME", "other")
    with pytest.raises(ValueError, match="tpu='other'"):
        get_strategy("auto")
    assert calls == [
        {"tpu": "my-tpu", "zone": "z", "project": "p"},
        {"tpu": "other", "zone": None, "project": None},
    ]


JAX = """
import keras, numpy as np
from tokenlearner_keras.training import distributed, get_strategy
for arguments in ({"name": "tpu"}, {"name": "mirrored"}, {"name": "multi_worker"},
                  {"name": "mirrored", "devices": ["cpu:9"]}):
    try:
        get_strategy(**arguments)
    except ValueError as error:
        print("ERROR", error)
cpu = get_strategy("cpu")
distribution = get_strategy("auto")
assert isinstance(distribution, keras.distribution.DataParallel)
assert keras.distribution.distribution() is distribution
with distribution.scope():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    assert distributed(model) is model
    model.compile("sgd", "mse")
model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0)
print(model.layers[1].kernel.value.sharding.device_set.__len__(), "devices")
"""


def test_jax():
    environment = {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    result = subprocess.run(
        [sys.executable, "-c", JAX], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    errors = [line for line in lines if line.startswith("ERROR")]
    assert len(errors) == 4
    assert "'tpu' needs a device of type 'tpu'" in errors[0]
    assert "'mirrored' needs a device of type 'gpu'" in errors[1]
    assert "KERAS_DISTRIBUTION_JOB_ADDRESSES is not set" in errors[2]
    assert "devices=['cpu:9']" in errors[3]
    assert any("'cpu': DataParallel on 1 devices" in line for line in lines)
    assert any("'auto': DataParallel on 4 devices" in line for line in lines)
    assert lines[-1] == "4 devices"
    assert keras.backend.backend() == "tensorflow"


JAX_PROCESSES = """
import jax, keras, numpy as np, tensorflow as tf
from tokenlearner_keras.training import get_strategy
keras.utils.set_random_seed(0)
get_strategy("auto")
inputs = keras.Input((4,))
model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
model.compile("sgd", "mse")
rng = np.random.default_rng(0)
arrays = rng.normal(size=(8, 4)), rng.normal(size=(8, 2))
batches = tf.data.Dataset.from_tensor_slices(arrays).batch(4)
losses = model.fit(batches, verbose=0).history["loss"]
print("RESULT", jax.process_count(), len(jax.devices()), *losses)
"""


@pytest.mark.slow
def test_jax_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"

    def start(**variables):
        return subprocess.Popen(
            [sys.executable, "-c", JAX_PROCESSES],
            env={
                **os.environ,
                "KERAS_BACKEND": "jax",
                "JAX_PLATFORMS": "cpu",
                **{f"KERAS_DISTRIBUTION_{k}": v for k, v in variables.items()},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(process):
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        lines = [x for x in output.splitlines() if x.startswith("RESULT")]
        return [float(x) for x in lines[0].split()[1:]]

    workers = [
        start(JOB_ADDRESSES=address, NUM_PROCESSES="2", PROCESS_ID=number)
        for number in ("0", "1")
    ]
    one, *several = map(finish, [start(), *workers])
    assert one[:2] == [1, 1]
    for result in several:
        assert result[:2] == [2, 2]
        np.testing.assert_allclose(result[2:], one[2:], rtol=1e-5)


@pytest.mark.tensorflow
def test_the_same_devices_give_the_same_mirrored_strategy():
    # TensorFlow fails on the second model if each has a strategy of its own.
    first = get_strategy("mirrored", devices=["CPU:0"], verbose=False)
    assert get_strategy("mirrored", devices=["/cpu:0"], verbose=False) is first
