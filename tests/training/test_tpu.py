"""What can be known of a TPU without one: the real compiler, and lowering by XLA."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import tokenlearner_keras as tlk

pytestmark = pytest.mark.tensorflow
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMPILE = """
import json, sys
from tpu_compile import compile_step
for name in sys.argv[2:]:
    print("RESULT", json.dumps(compile_step(name, sys.argv[1])), flush=True)
"""


def compile_for(topology, *names):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path]),
    }
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, topology, *names],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    return [json.loads(x.removeprefix("RESULT ")) for x in lines if "RESULT" in x]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None
    or importlib.util.find_spec("jax") is None,
    reason="needs the TPU compiler: pip install jax libtpu",
)
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v6e:2x2"])
def test_training_steps_compile_for_tpus(topology):
    results = compile_for(topology, "vit", "vivit", "x2plus1d")
    assert [r["model"] for r in results] == ["vit", "vivit", "x2plus1d"]
    for result in results:
        assert result["dynamic_shapes"] == 0
        assert 0 < result["memory_gib"] <= result["memory_limit_gib"], result
        assert result["collectives"]["all-reduce"] >= 1
        assert result["gflops_per_example"] > 1


def lower(model, batch_size):
    """HLO of a training step on TensorFlow: loss, gradients and plain descent."""
    import tensorflow as tf

    @tf.function(jit_compile=True, autograph=False)
    def step(x, y):
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(
                y, outputs
            )
        weights = [v.value for v in model.trainable_variables]
        for weight, gradient in zip(weights, tape.gradient(loss, weights)):
            weight.assign_sub(0.01 * tf.cast(gradient, weight.dtype))
        return loss

    x = tf.TensorSpec((batch_size, *model.input_shape[1:]), "float32")
    y = tf.TensorSpec((batch_size,), "int32")
    return step.experimental_get_compiler_ir(x, y)(stage="hlo")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "vivit", "x2plus1d"])
def test_training_steps_lower_with_static_shapes(name):
    keras.config.set_dtype_policy("mixed_bfloat16")
    if name == "vit":
        model = tlk.models.vit("B/16", (384, 384, 3), num_tokens=8)
    elif name == "vivit":
        model = tlk.models.vivit("B/16", num_tokens=8, num_classes=400)
    else:
        model = tlk.models.x2plus1d("M")
    hlo = lower(model, 2)
    assert "bf16[" in hlo
    # A dynamic dimension is written as a bound, f32[<=8,16], or needs these.
    assert not re.search(r"\[[^\]]*<=\d", hlo)
    assert "set-dimension-size" not in hlo
    assert "get-dimension-size" not in hlo
