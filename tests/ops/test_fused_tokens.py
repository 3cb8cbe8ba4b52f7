"""The GPU kernels of TokenLearner and TokenFuser, without a GPU in an interpreter."""

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("the kernels are for the JAX backend", allow_module_level=True)

import jax
import jax.numpy as jnp

from tests.ops.vector_attention_reference import relative_errors
from tokenlearner_keras import layers
from tokenlearner_keras.layers._forms import literal_definitions
from tokenlearner_keras.ops import _fused, _fused_tokens

pytestmark = pytest.mark.backends
INTERPRET = jax.default_backend() != "gpu"


@pytest.fixture(autouse=True)
def kernel():
    with _fused.force("interpret" if INTERPRET else "kernel"):
        yield


@pytest.fixture
def runs(monkeypatch):
    """The directions in which the kernel was traced."""
    directions, run = [], _fused_tokens._run
    monkeypatch.setattr(
        _fused_tokens,
        "_run",
        lambda direction, *args: directions.append(direction) or run(direction, *args),
    )
    _fused_tokens._function.cache_clear()
    yield directions
    _fused_tokens._function.cache_clear()


def normal(*shape, dtype="bfloat16", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def set_weights(layer):
    rng = np.random.default_rng(1)
    for variable in layer.variables:
        variable.assign(0.3 * rng.standard_normal(variable.shape))


def results(layer, inputs, upstream):
    """Outputs and the gradients of weights and inputs."""

    def outputs(variables, inputs):
        return layer.stateless_call(variables, [], inputs)[0]

    def run(variables, inputs, upstream):
        y, pullback = jax.vjp(outputs, variables, inputs)
        return y, pullback(upstream.astype(y.dtype))

    variables = [v.value for v in layer.trainable_variables]
    return jax.tree.leaves(jax.jit(run)(variables, inputs, upstream))


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, "float32"), tree)


@pytest.mark.parametrize(
    ("shape", "arguments"),
    [
        ((2, 7, 7, 80), {"num_tokens": 8, "value_dim": 12}),
        ((2, 3, 4, 5, 17), {"num_tokens": 3, "pooling": "sum"}),
        ((1, 1, 8, 8, 64), {"num_tokens": 4, "kernel_size": 5}),
        ((3, 9, 7), {"num_tokens": 9, "kernel_size": 2}),
        ((1, 8, 7, 3), {"num_tokens": 14}),
    ],
)
def test_token_learner(shape, arguments, runs):
    layer, reference = (
        layers.TokenLearner.video(dtype=dtype, **arguments)
        for dtype in ("mixed_bfloat16", "float32")
    )
    x = normal(*shape)
    for each in (layer, reference):
        each.build(shape)
        set_weights(each)
    upstream = normal(*layer.compute_output_shape(shape), seed=2)
    actual = wide(results(layer, x, upstream))
    assert set(runs) == {"forward", "backward"}
    with _fused.force("off"):
        expected = wide(results(reference, x.astype("float32"), upstream))
        plain = wide(results(layer, x, upstream))
    # What half precision costs without the kernel too.
    for error, other in zip(
        relative_errors(actual, expected), relative_errors(plain, expected), strict=True
    ):
        assert error < min(2e-2, max(1.2 * other, 3e-3))


def test_frames_are_apart():
    layer = layers.TokenLearner.video(2, dtype="mixed_bfloat16")
    layer.build((None, 4, 4, 6))
    set_weights(layer)
    x = normal(3, 4, 4, 6)
    together = np.asarray(layer(x), "float32")
    for i in range(3):
        alone = np.asarray(layer(x[i : i + 1]), "float32")
        np.testing.assert_array_equal(together[i : i + 1], alone)


def test_second_derivatives():
    shape = _fused_tokens.Shape(4, 5, 9, 3, 2, 20.0)
    x, kernel = normal(2, 20, 9), normal(9, 18, seed=1) * 0.3
    upstream = normal(2, 2, 9, seed=2)
    directions = normal(2, 20, 9, seed=3), normal(9, 18, seed=4)

    def product(function):
        def total(*args):
            gradients = jax.vjp(function, *args)[1](upstream)
            pairs = zip(gradients, directions)
            return sum(jnp.sum((g * d).astype("float32")) for g, d in pairs)

        return wide(jax.jit(jax.grad(total, (0, 1)))(x, kernel))

    actual = product(_fused_tokens._function(shape, INTERPRET))
    expected = product(lambda *args: _fused_tokens._plain(*args, shape))
    assert max(relative_errors(actual, expected)) < 2e-2


def test_vmap():
    x, kernel = normal(2, 3, 20, 9), normal(2, 3, 3, 9, 2, seed=1)

    def tokens(x, kernel):
        return _fused_tokens.tokens(x, kernel, 4, 5, 20.0)

    expected = np.stack([wide(tokens(x[i], kernel[0])) for i in range(2)])
    actual = wide(jax.vmap(tokens, (0, None))(x, kernel[0]))
    np.testing.assert_array_equal(actual, expected)
    # Kernels of their own.
    actual = wide(jax.vmap(tokens)(x, kernel))
    np.testing.assert_array_equal(actual[0], expected[0])
    np.testing.assert_array_equal(actual[1], wide(tokens(x[1], kernel[1])))


@pytest.mark.parametrize(
    "case",
    [
        *("float32", "mlp", "norm", "bias", "two", "softmax", "mask", "maps"),
        *("dropout", "large", "literal", "unknown"),
    ],
)
def test_what_the_kernel_leaves_to_others(case, runs):
    arguments = {
        "mlp": {"attention": "mlp"},
        "norm": {"use_norm": True},
        "bias": {"use_bias": True},
        "two": {"num_convs": 2},
        "softmax": {"activation": "softmax"},
        "dropout": {"dropout": 0.5},
    }.get(case, {})
    dtype = "float32" if case == "float32" else "mixed_bfloat16"
    layer = layers.TokenLearner(2, **{"num_convs": 1, "dtype": dtype, **arguments})
    size = 12 if case == "large" else 4
    x = normal(1, size, size, 6)
    call = {
        "mask": {"mask": np.ones((1, 4, 4), bool)},
        "maps": {"return_attention_maps": True},
        "dropout": {"training": True},
    }.get(case, {})
    if case == "literal":
        with literal_definitions():
            layer(x)
    elif case == "unknown":
        inputs = keras.Input((None, None, 6), dtype="bfloat16")
        keras.Model(inputs, layer(inputs))
    else:
        layer(x, **call)
    assert not runs


@pytest.mark.parametrize(
    "shape", [(2, 3, 7, 7, 40), (2, 4, 5, 16), (2, 20, 16), (2, 1, 1, 520)]
)
def test_token_fuser(shape, monkeypatch):
    calls, sums = [], _fused_tokens._sums
    monkeypatch.setattr(
        _fused_tokens, "_sums", lambda *args: calls.append(1) or sums(*args)
    )
    _fused_tokens._add.cache_clear()
    tokens = (2, 24 if len(shape) == 5 else 8, shape[-1])
    layer, reference = (
        layers.TokenFuser("broadcast", dtype=dtype)
        for dtype in ("mixed_bfloat16", "float32")
    )
    for each in (layer, reference):
        each.build([tokens, shape])
        set_weights(each)
    inputs, upstream = [normal(*tokens), normal(*shape, seed=2)], normal(*shape, seed=3)
    actual = wide(results(layer, inputs, upstream))
    assert calls
    with _fused.force("off"):
        inputs = [x.astype("float32") for x in inputs]
        expected = wide(results(reference, inputs, upstream))
    assert max(relative_errors(actual, expected)) < 1e-2
    _fused_tokens._add.cache_clear()


def test_sums_of_positions():
    x = normal(3, 49, 70)
    expected = wide(x).sum(1)
    actual = wide(_fused_tokens._sums(x, INTERPRET))
    np.testing.assert_allclose(actual, expected, rtol=4e-3, atol=1e-6)
    # The sum is in float32: exact for whole numbers, then rounded once.
    ones = jnp.ones((1, 63, 16), "bfloat16")
    np.testing.assert_array_equal(wide(_fused_tokens._sums(ones, INTERPRET)), 63)
    add = _fused_tokens._add(49, INTERPRET)
    second = jax.grad(
        lambda v: jnp.sum(
            jax.grad(lambda u: jnp.sum(jnp.sin(add(x, u).astype("float32"))))(v) ** 2
        ).astype("float32")
    )
    v = normal(3, 70, seed=4)
    assert np.isfinite(wide(second(v))).all()
