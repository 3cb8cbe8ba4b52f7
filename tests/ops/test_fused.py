"""The fused GPU kernel against float64, without a GPU in Pallas's interpreter."""

import contextlib
import re

import numpy as np
import pytest
from keras import ops

from tests.ops.test_vector_attention import HARD, normal
from tests.ops.vector_attention_reference import (
    BACKEND,
    assert_accurate,
    reference,
    relative_errors,
    value_and_gradients,
)
from tokenlearner_keras.ops import vector_attention

if BACKEND != "jax":
    pytest.skip("the kernel is for the JAX backend", allow_module_level=True)

import jax

from tokenlearner_keras import layers
from tokenlearner_keras.layers._forms import literal_definitions
from tokenlearner_keras.ops import _fused

INTERPRET = jax.default_backend() != "gpu"


@pytest.fixture(autouse=True)
def kernel():
    with _fused.force("interpret" if INTERPRET else "kernel"):
        yield


def programs(query, key, value, mask=None):
    """How many of the kernel's programs left the series."""
    size, mask = _fused._series.size(40), mask if mask is None else mask[..., None]
    stats = _fused._forward(
        (
            *(jax.numpy.asarray(x) for x in (query, key, value)),
            None if mask is None else jax.numpy.asarray(mask, "float32"),
        ),
        size=size,
        exact=True,
        save=True,
        interpret=INTERPRET,
    )[1]
    bad = np.asarray(stats[:, 3]) > 0
    columns = _fused.tiles(*bad.shape, [query.dtype]).columns
    bad = np.pad(bad, ((0, 0), (0, -bad.shape[1] % columns)))
    return bad.reshape(bad.shape[0], -1, columns).any(-1)


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0, 10.0])
@pytest.mark.parametrize(
    ("queries", "keys", "channels"), [(64, 64, 8), (70, 101, 3), (1, 57, 9)]
)
def test_accuracy(scale, queries, keys, channels):
    rng = np.random.default_rng(queries)
    q, k = normal(rng, queries, scale, channels), normal(rng, keys, scale, channels)
    assert_accurate(q, k, normal(rng, keys, 1, channels), jit=True)


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("name", list(HARD))
def test_accuracy_on_hard_inputs(name, scale):
    rng = np.random.default_rng(1)
    q, k, v = (normal(rng, 130) for _ in range(3))
    assert_accurate(*HARD[name](rng, np.float32(scale) * q, k, v), jit=True)


@pytest.fixture
def forward_calls(monkeypatch):
    """What the forward kernel was given: the arguments, and the others by name."""
    calls, forward = [], _fused._forward
    monkeypatch.setattr(
        _fused,
        "_forward",
        lambda args, **options: (
            calls.append((args, options)) or forward(args, **options)
        ),
    )
    _fused.attention.cache_clear()
    yield calls
    _fused.attention.cache_clear()


@pytest.mark.parametrize(("scale", "factor"), [(1.0, 1.0), (50.0, 0.7)])
def test_half_precision(scale, factor, forward_calls):
    rng = np.random.default_rng(9)
    shapes = (20, scale), (45, scale), (45, 1), (20, 1)
    arrays = [normal(rng, n, s).astype(jax.numpy.bfloat16) for n, s in shapes]
    wide = [np.asarray(x, "float32") for x in arrays]
    expected = reference(np.float32(factor) * wide[0], *wide[1:])
    expected[1] *= factor
    results = value_and_gradients(*arrays, scale=factor)
    seen = [[str(y.dtype) for y in args[:3]] for args, _ in forward_calls]
    # Rounded once, at the end: float32 inside.
    assert max(relative_errors(results, expected)) < 2.5e-3
    # Only a query that was scaled is converted before.
    query = "bfloat16" if factor == 1.0 else "float32"
    assert seen == [[query, "bfloat16", "bfloat16"]]


@pytest.mark.parametrize("terms", [30, 40])
def test_which_series(terms, forward_calls):
    """The short one for bfloat16 alone, and within the rounding of its results."""
    rng = np.random.default_rng(11)
    arrays = [normal(rng, 70, s, 16).astype(jax.numpy.bfloat16) for s in (2, 2, 1, 1)]
    expected = reference(*(np.asarray(x, "float32") for x in arrays))
    if terms == 40:
        arrays[0] = arrays[0].astype("float32")
    results = value_and_gradients(*arrays)
    seen = [options["size"] for _, options in forward_calls]
    assert [size[0] for size in seen] == [terms]
    assert max(relative_errors(results, expected)) < 2.5e-3
    # Most of it by the series.
    stats = _fused._forward(
        (*(jax.numpy.asarray(x, "float32") for x in arrays[:3]), None),
        size=seen[0],
        exact=True,
        save=True,
        interpret=INTERPRET,
    )[1]
    assert np.mean(np.asarray(stats[:, 3]) == 0) > 0.5


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_masks_and_cross_attention(scale):
    rng = np.random.default_rng(2)
    shape = (3, 61, 3)
    q = np.repeat(normal(rng, 45, scale), 3, axis=0)
    k, v = (scale * rng.standard_normal(shape).astype("float32") for _ in range(2))
    mask = rng.random((3, 61)) < 0.5
    mask[1] = True
    mask[2] = False
    assert_accurate(q, np.where(mask[..., None], k, 0), v, mask=mask, jit=True)
    output = vector_attention(q, k, v, mask=mask)
    np.testing.assert_array_equal(np.asarray(output)[2], 0)
    # What stands in masked positions does not matter.
    k[~mask], v[~mask] = np.nan, np.inf
    np.testing.assert_array_equal(
        np.asarray(vector_attention(q, k, v, mask=mask)), np.asarray(output)
    )


def test_one_difficult_channel_leaves_the_others_alone():
    rng = np.random.default_rng(3)
    q, k, v = (normal(rng, 64, 1, 24) for _ in range(3))
    k[..., 10] *= 50
    np.testing.assert_array_equal(programs(q, k, v), [[False, True, False]])
    assert_accurate(q, k, v, jit=True)


def test_a_short_series_is_enough_for_ordinary_inputs():
    rng = np.random.default_rng(4)
    arrays = [normal(rng, 128, 1, 16) for _ in range(3)]
    assert not programs(*arrays).any()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_infinities_give_the_nans_of_dense(which, value):
    rng = np.random.default_rng(5)
    arrays = {name: normal(rng, 45) for name in ("query", "key", "value")}
    arrays["query"][0, 2, 1] = 0
    arrays[which][0, 5, 1] = value
    output = np.asarray(vector_attention(**arrays))
    dense = np.asarray(vector_attention(**arrays, method="dense"))
    np.testing.assert_array_equal(np.isnan(output), np.isnan(dense))
    np.testing.assert_allclose(output, dense, rtol=1e-4, atol=1e-6)


def test_interpolated_is_nan_where_its_bound_fails():
    rng = np.random.default_rng(6)
    q, k, v, g = (normal(rng, 50) for _ in range(4))
    q[..., 0] *= 100
    results = value_and_gradients(q, k, v, g, method="interpolated")
    expected = reference(q, k, v, g)
    for result in results:
        assert np.all(np.isnan(result[..., 0]))
    kept = [x[..., 1:] for x in results]
    assert max(relative_errors(kept, [x[..., 1:] for x in expected])) < 1e-5


@pytest.mark.parametrize("num_terms", [3, 17, 40])
def test_num_terms(num_terms):
    rng = np.random.default_rng(7)
    q, k, v = normal(rng, 45, 1e-4), normal(rng, 45), normal(rng, 45)
    output = vector_attention(q, k, v, method="interpolated", num_terms=num_terms)
    expected = reference(q, k, v, v)[0]
    np.testing.assert_allclose(np.asarray(output), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_second_derivatives(scale, masked):
    rng = np.random.default_rng(8)
    arrays = [normal(rng, 45, s, 2) for s in (scale, scale, 1)]
    mask = rng.random((1, 45)) < 0.7 if masked else None
    directions = [np.cos(7 * a) for a in arrays]

    def product(method):
        def loss(*tensors):
            return ops.sum(
                ops.sin(vector_attention(*tensors, mask=mask, method=method))
            )

        def total(*tensors):
            gradients = jax.grad(loss, (0, 1, 2))(*tensors)
            return sum(ops.sum(g * d) for g, d in zip(gradients, directions))

        return jax.jit(jax.grad(total, (0, 1, 2)))(*arrays)

    expected, actual = (
        [np.asarray(x) for x in product(method)] for method in ("dense", "auto")
    )
    assert max(relative_errors(actual, expected)) < 1e-4


def test_vmap():
    rng = np.random.default_rng(9)
    q, k, v = (rng.standard_normal((2, 3, 48, 4)).astype("float32") for _ in range(3))
    output = jax.vmap(vector_attention)(q, k, v)
    for i in range(2):
        np.testing.assert_allclose(
            np.asarray(output[i]), np.asarray(vector_attention(q[i], k[i], v[i]))
        )


@pytest.mark.parametrize("method", ["auto", "interpolated"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "channels"), [(512, 432), (77, 5)])
def test_lowers_for_a_gpu(method, masked, tokens, channels):
    x = jax.ShapeDtypeStruct((2, tokens, channels), "float32")
    mask = jax.ShapeDtypeStruct((2, tokens), "bool") if masked else None

    def run(q, k, v, g, mask):
        output, pullback = jax.vjp(
            lambda *t: vector_attention(*t, mask=mask, method=method), q, k, v
        )
        return output, *pullback(g)

    with _fused.force("kernel"):
        traced = jax.jit(run).trace(x, x, x, x, mask)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # XLA compiles the kernels, or JAX does (after 0.10.2).
    assert len(re.findall(r"xla\.gpu\.triton|@triton_kernel_call", text)) == 2


def packed_layer(**arguments):
    layer = layers.VectorAttention(**arguments)
    layer.build((None, 45, 6))
    rng = np.random.default_rng(3)
    for variable in layer.variables:
        variable.assign(0.4 * rng.standard_normal(variable.shape))
    return layer


def outputs_and_gradients(layer, x, upstream, second=False):
    """Outputs, the gradients of weights and input, and one of second order."""

    def outputs(variables, x):
        return layer.stateless_call(variables, [], x)[0]

    def gradients(variables, x, upstream):
        return jax.vjp(outputs, variables, x)[1](upstream)

    def total(x, variables, upstream):
        leaves = jax.tree.leaves(gradients(variables, x, upstream))
        return sum((y**2).sum() for y in leaves)

    def run(variables, x, upstream):
        results = outputs(variables, x), gradients(variables, x, upstream)
        return (*results, jax.grad(total)(x, variables, upstream) if second else ())

    variables = [v.value for v in layer.trainable_variables]
    leaves = jax.tree.leaves(jax.jit(run)(variables, x, upstream))
    return [np.asarray(y, "float32") for y in leaves]


def packed_shapes(calls):
    """The shapes of what the kernel was given in one tensor."""
    return {args[0].shape for args, _ in calls if len(args) == 2}


@pytest.mark.parametrize(
    "arguments", [{}, {"use_bias": True, "method": "interpolated"}]
)
def test_layer_projects_all_three_at_once(arguments, forward_calls):
    layer = packed_layer(output_projection=True, **arguments)
    rng = np.random.default_rng(4)
    x, upstream = (normal(rng, 45, 1, 6) for _ in range(2))
    actual = outputs_and_gradients(layer, x, upstream, second=True)
    assert packed_shapes(forward_calls) == {(1, 45, 18)}
    assert len(actual) == len(layer.trainable_variables) + 3
    with _fused.force("off"):
        expected = outputs_and_gradients(layer, x, upstream, second=True)
    for a, e in zip(actual, expected, strict=True):
        # The gradient of a bias of the keys is zero, but for rounding.
        np.testing.assert_allclose(a, e, rtol=2e-4, atol=2e-4 * np.abs(e).max() + 2e-5)


def test_difficult_channels_of_one_tensor(forward_calls):
    layer = packed_layer()
    layer.query_dense.kernel.assign(30 * layer.query_dense.kernel)
    rng = np.random.default_rng(5)
    x, upstream = (normal(rng, 45, 3, 6) for _ in range(2))
    actual = outputs_and_gradients(layer, x, upstream)
    assert packed_shapes(forward_calls)
    with _fused.force("off"):
        expected = outputs_and_gradients(layer, x, upstream)
    assert max(relative_errors(actual, expected)) < 1e-5


def test_half_precision_in_one_tensor(forward_calls):
    rng = np.random.default_rng(6)
    x, upstream = (normal(rng, 45, 1, 6).astype(jax.numpy.bfloat16) for _ in range(2))
    layer = packed_layer(dtype="mixed_bfloat16")
    actual = outputs_and_gradients(layer, x, upstream)
    assert packed_shapes(forward_calls)
    wide = packed_layer()
    with _fused.force("off"):
        expected = outputs_and_gradients(
            wide, *(y.astype("float32") for y in (x, upstream))
        )
    assert max(relative_errors(actual, expected)) < 2e-2


@pytest.mark.parametrize(
    "case", ["cross", "mask", "scale", "dropout", "gamma", "lora", "int8", "literal"]
)
def test_layers_that_cannot_project_at_once(case, forward_calls):
    arguments = {
        "scale": {"scale": 0.5},
        "dropout": {"dropout": 0.1},
        "gamma": {"gamma": True},
    }.get(case, {})
    layer = packed_layer(**arguments)
    x = normal(np.random.default_rng(7), 45, 1, 6)
    call = {
        "cross": {"value": normal(np.random.default_rng(8), 50, 1, 6)},
        "mask": {"mask": np.arange(45)[None] < 30},
        "dropout": {"training": True},
    }.get(case, {})
    if case == "lora":
        layer.key_dense.enable_lora(2)
        layer.key_dense.lora_kernel_b.assign(np.ones((2, 6)))
    elif case == "int8":
        layer.value_dense.quantize("int8")
    with literal_definitions() if case == "literal" else contextlib.nullcontext():
        y = np.asarray(jax.jit(lambda x: layer(x, **call))(x))
    assert not packed_shapes(forward_calls)
    assert np.isfinite(y).all()
