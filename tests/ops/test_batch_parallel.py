"""What spreads the batch of a GPU kernel over devices, on virtual CPU devices."""

import subprocess
import sys

import keras
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("the kernels are for the JAX backend", allow_module_level=True)

pytestmark = pytest.mark.backends

# Without the rule a kernel would be as opaque as this function, which sorts.
SCRIPT = """
import os
os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tokenlearner_keras.ops import _fused, _fused_tokens, vector_attention
from tokenlearner_keras.ops._batch_parallel import batch_parallel

mesh = Mesh(np.array(jax.devices()), ("batch",))
by_batch, whole = (NamedSharding(mesh, spec) for spec in (P("batch"), P()))
rng = np.random.default_rng(0)

def check(function, shared, batched):
    args = (*shared, *batched)
    shardings = (whole,) * len(shared) + (by_batch,) * len(batched)
    expected = jax.jit(function)(*args)
    compiled = jax.jit(function, in_shardings=shardings).lower(*args).compile()
    text = compiled.as_text()
    actual = compiled(*(jax.device_put(*pair) for pair in zip(args, shardings)))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = (np.asarray(x, "float32") for x in (a, e))
        np.testing.assert_allclose(a, e, rtol=1e-2, atol=1e-2 * np.abs(e).max())
    return text, jax.tree.leaves(actual)

# Which shapes a function sees: those of one device.
shapes = []

def opaque(weight, x):
    shapes.append(x.shape)
    return (x @ weight,)

x = jnp.asarray(rng.standard_normal((8, 5)), "float32")
weight = jnp.asarray(rng.standard_normal((5, 3)), "float32")
check(lambda w, x: batch_parallel(opaque, num_shared=1)(w, x)[0], [weight], [x])
assert (2, 5) in shapes, shapes

with _fused.force("interpret"):
    tensors = [jnp.asarray(rng.standard_normal((8, 48, 4)), "float32") for _ in range(4)]
    mask = jnp.asarray(rng.random((8, 48)) < 0.7)

    def attention(q, k, v, g, mask):
        y, pullback = jax.vjp(lambda *t: vector_attention(*t, mask=mask), q, k, v)
        return y, *pullback(g)

    text, results = check(attention, [], [*tensors, mask])
    assert "all-gather" not in text and "all-reduce" not in text
    assert all(y.sharding.spec == P("batch") for y in results)

    x = jnp.asarray(rng.standard_normal((8, 20, 9)), "bfloat16")
    kernel = jnp.asarray(rng.standard_normal((3, 3, 9, 2)), "bfloat16")
    g = jnp.asarray(rng.standard_normal((8, 2, 9)), "bfloat16")

    def tokens(kernel, x, g):
        run = lambda kernel, x: _fused_tokens.tokens(x, kernel, 4, 5, 20.0)
        y, pullback = jax.vjp(run, kernel, x)
        return y, *pullback(g)

    text, results = check(tokens, [kernel], [x, g])
    # The kernel's gradient alone is a sum over the devices.
    assert "all-gather" not in text and "all-reduce" in text
    assert results[0].sharding.spec == results[2].sharding.spec == P("batch")
print("done")
"""


def test_each_device_computes_its_part():
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert result.stdout.strip().endswith("done"), result.stderr[-3000:]
