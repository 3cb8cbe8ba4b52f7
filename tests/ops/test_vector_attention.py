import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from tests.ops.vector_attention_reference import (
    BACKEND,
    assert_accurate,
    reference,
    relative_errors,
    value_and_gradients,
)
from tokenlearner_keras.ops import (
    _series,
    force_vector_attention_method,
    vector_attention,
    vector_attention_error_bound,
)

SHAPE_CHANNELS = 3
SCALES = (0.01, 0.3, 1.0, 3.0, 10.0)


def normal(rng, tokens, scale=1.0, channels=SHAPE_CHANNELS):
    return (scale * rng.standard_normal((1, tokens, channels))).astype("float32")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "tokens", [1, 2, 7, 64, 512, pytest.param(2048, marks=pytest.mark.slow)]
)
def test_accuracy(tokens, scale):
    rng = np.random.default_rng(tokens)
    # Few channels where the reference and the blocks take longer.
    channels = 1 if tokens == 2048 else SHAPE_CHANNELS
    q, k = (normal(rng, tokens, scale, channels) for _ in range(2))
    methods = ("auto", "streaming") if tokens <= 64 else ("auto",)
    assert_accurate(q, k, normal(rng, tokens, 1, channels), methods)


def _student(rng, q, k, v):
    return q, rng.standard_t(2, k.shape).astype("float32"), v


def _outlier(rng, q, k, v):
    k[:, 0] = 50 * np.abs(k).max()
    return q, k, v


HARD = {
    "student": _student,
    "outlier": _outlier,
    "keys + 1000": lambda rng, q, k, v: (q, k + np.float32(1000), v),
    "values + 1000": lambda rng, q, k, v: (q, k, v + np.float32(1000)),
    "zero queries": lambda rng, q, k, v: (0 * q, k, v),
    "constant keys": lambda rng, q, k, v: (q, 0 * k + 3, v),
    "large constant keys": lambda rng, q, k, v: (q, 0 * k + 1e4, v),
}


@pytest.mark.parametrize(
    ("tokens", "scale"),
    [
        *((n, 1.0) for n in (1, 2, 7, 64, 512)),
        (512, 0.02),
        (512, 0.1),
        pytest.param(2048, 1.0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", list(HARD))
def test_accuracy_on_hard_inputs(name, tokens, scale):
    rng = np.random.default_rng(1)
    channels = 1 if tokens == 2048 else SHAPE_CHANNELS
    q, k, v = (normal(rng, tokens, 1, channels) for _ in range(3))
    assert_accurate(*HARD[name](rng, np.float32(scale) * q, k, v))


EVERY = {
    **{f"scale {x}": lambda rng, q, k, v, x=x: (x * q, x * k, v) for x in SCALES},
    **HARD,
}


@pytest.mark.parametrize("name", list(EVERY))
@pytest.mark.parametrize(
    "tokens",
    [1, 7, 64, 512, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 2048))],
)
def test_accuracy_of_bfloat16(tokens, name):
    rng = np.random.default_rng(2)
    arrays = EVERY[name](rng, *(normal(rng, tokens, 1, 1) for _ in range(3)))
    arrays = [ops.cast(x, "bfloat16") for x in (*arrays, normal(rng, tokens, 1, 1))]
    rounded = [np.asarray(ops.convert_to_numpy(ops.cast(a, "float32"))) for a in arrays]
    expected = reference(*rounded)
    limits = relative_errors(value_and_gradients(*arrays, method="dense"), expected)
    errors = relative_errors(value_and_gradients(*arrays), expected)
    for name, error, limit in zip(("value", "dq", "dk", "dv"), errors, limits):
        assert error <= max(2e-2, 2 * limit), (name, error, limit)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 64),
    keys=st.integers(1, 64),
    query_scale=st.floats(1e-3, 10),
    key_scale=st.floats(1e-3, 10),
    key_offset=st.sampled_from([0.0, -3.0, 1000.0]),
    value_offset=st.sampled_from([0.0, 1000.0]),
    tail=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_accuracy_property(
    queries,
    keys,
    query_scale,
    key_scale,
    key_offset,
    value_offset,
    tail,
    masked,
    seed,
):
    rng = np.random.default_rng(seed)
    k = normal(rng, keys, 1, 2)
    if tail:
        k = rng.standard_t(2, k.shape).astype("float32")
    k = (key_scale * k + key_offset).astype("float32")
    v = normal(rng, keys, 1, 2) + np.float32(value_offset)
    mask = rng.random((1, keys)) < 0.6 if masked else None
    q = normal(rng, queries, query_scale, 2)
    assert_accurate(q, k, v, ("auto", "streaming"), mask, seed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["auto", "streaming", "dense"])
def test_half_precision_is_float32_inside(dtype, method):
    rng = np.random.default_rng(0)
    arrays = [ops.cast(normal(rng, 64), dtype) for _ in range(4)]
    results = value_and_gradients(*arrays, method=method)
    rounded = [np.asarray(ops.convert_to_numpy(ops.cast(a, "float32"))) for a in arrays]
    errors = relative_errors(results, reference(*rounded))
    assert max(errors) <= (2e-2 if dtype == "bfloat16" else 2e-3)
    output = vector_attention(*arrays[:3], method=method)
    assert keras.backend.standardize_dtype(output.dtype) == dtype


# JAX has no float64 by default, and some of Keras's operations on PyTorch (`maximum`,
# a number times a tensor) go through float32.
@pytest.mark.skipif(BACKEND != "tensorflow", reason="float64 is TensorFlow's alone")
@pytest.mark.parametrize("scale", [0.3, 2.0, 4.0])
def test_float64(scale):
    rng = np.random.default_rng(0)
    arrays = [s * rng.standard_normal((1, 50, 2)) for s in (scale, scale, 1, 1)]
    errors = relative_errors(value_and_gradients(*arrays), reference(*arrays))
    assert max(errors) < 1e-13


@pytest.mark.backends
@pytest.mark.parametrize("method", ["auto", "streaming", "dense", "interpolated"])
def test_masks_and_cross_attention(method):
    rng = np.random.default_rng(3)
    q, k, v = normal(rng, 9), normal(rng, 60), normal(rng, 60)
    mask = rng.random((1, 60)) < 0.5
    k[:, ~mask[0]] = np.nan
    v[:, ~mask[0]] = np.inf
    upstream = normal(rng, 9)
    results = value_and_gradients(q, k, v, upstream, method=method, mask=mask)
    kept = reference(q, k[:, mask[0]], v[:, mask[0]], upstream)
    assert_all = [
        results[0],
        results[1],
        results[2][:, mask[0]],
        results[3][:, mask[0]],
    ]
    assert max(relative_errors(assert_all, kept)) < 1e-5
    for gradient in results[2:]:
        np.testing.assert_array_equal(gradient[:, ~mask[0]], 0)


@pytest.mark.parametrize("method", ["auto", "streaming", "dense", "interpolated"])
def test_rows_without_keys_are_zero(method):
    rng = np.random.default_rng(4)
    arrays = [normal(rng, 50) + 5 for _ in range(4)]
    results = value_and_gradients(*arrays, method=method, mask=np.zeros((1, 50), bool))
    for result in results:
        np.testing.assert_array_equal(result, 0)


@pytest.mark.backends
def test_masks_of_pairs():
    rng = np.random.default_rng(5)
    mask = rng.random((1, 20, 30)) < 0.3
    mask[:, 3] = False
    q, k, v = normal(rng, 20), normal(rng, 30), normal(rng, 30)
    assert_accurate(q, k, v, ("auto", "streaming", "dense"), mask)
    np.testing.assert_array_equal(
        ops.convert_to_numpy(vector_attention(q, k, v, mask=mask))[:, 3], 0
    )


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_infinities_give_the_nans_of_dense(which, value):
    rng = np.random.default_rng(6)
    arrays = {name: normal(rng, 45) for name in ("query", "key", "value")}
    arrays["query"][0, 2, 1] = 0
    arrays[which][0, 5, 1] = value
    with np.errstate(all="ignore"):
        outputs = {
            method: ops.convert_to_numpy(vector_attention(**arrays, method=method))
            for method in ("dense", "auto", "streaming")
        }
    for method in ("auto", "streaming"):
        np.testing.assert_array_equal(
            np.isnan(outputs[method]), np.isnan(outputs["dense"])
        )
        np.testing.assert_allclose(outputs[method], outputs["dense"], rtol=1e-4)


def test_interpolated_says_where_its_bound_fails():
    rng = np.random.default_rng(7)
    q, k, v = normal(rng, 50), normal(rng, 50), normal(rng, 50)
    q[..., 0] *= 100
    output = ops.convert_to_numpy(vector_attention(q, k, v, method="interpolated"))
    assert np.all(np.isnan(output[..., 0]))
    expected = reference(q, k, v, v)[0]
    np.testing.assert_allclose(output[..., 1:], expected[..., 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("num_terms", "dtype"),
    [*((n, "float32") for n in (4, 16, 30, 35, 40, 50, 64)), (30, "bfloat16")],
)
@pytest.mark.parametrize("z", [0.0, 0.3, 2.0, 8.0, 20.0, 26.0, 40.0])
def test_error_bound_holds(num_terms, dtype, z):
    _, reach, scales = _series.size(num_terms, dtype)
    bound = vector_attention_error_bound(z, 2.0, num_terms, dtype)
    w = np.linspace(-z, z, 5001)
    value = np.polynomial.polynomial.polyval(
        w / reach, np.exp(reach) * np.array(scales)
    )
    truth = np.max(np.abs(value - np.exp(w)) * np.exp(-np.abs(w)))
    assert truth <= bound * 1.01 + 1e-12
    # Sharp enough to be of use where the series is, and the cancellation the largest.
    if z <= reach:
        limit = 2.0**-23 if dtype == "float32" else 2.0**-8 / _series.MAX_CANCELLATION
        assert bound <= limit * 1.01


def test_error_bound_bounds_the_output():
    rng = np.random.default_rng(8)
    for scale in (0.5, 1.0, 1.5):
        q, k, v = (scale * rng.standard_normal((1, 80, 1)) for _ in range(3))
        middle = (k.max() + k.min()) / 2
        w = q[0] * (k[0].T - middle)
        cancellation = np.exp(np.abs(w)).sum(1) / np.exp(w).sum(1)
        spread = np.abs(v[0].T - reference(q, k, v, v)[0][0]).max(1)
        for num_terms in (20, 40):
            bound = vector_attention_error_bound(
                np.abs(q).max(), np.ptp(k), num_terms, "float64"
            )
            # The truncated polynomial itself, exactly.
            p = np.arange(num_terms)
            factorials = np.cumprod(np.maximum(p, 1.0))
            weights = np.polynomial.polynomial.polyval(w, 1 / factorials)
            y = (weights @ v[0])[:, 0] / weights.sum(1)
            error = np.abs(y - reference(q, k, v, v)[0][0, :, 0])
            usable = bound * cancellation < 0.5
            limit = bound * cancellation / (1 - bound * cancellation) * spread
            assert np.all(error[usable] <= limit[usable] + 1e-12)


def test_error_bound_arguments():
    with pytest.raises(ValueError, match=r"`max_query` must not be negative.*-1"):
        vector_attention_error_bound(-1, 1, 8)
    with pytest.raises(ValueError, match=r"`num_terms` must be an integer.*=0"):
        vector_attention_error_bound(1, 1, 0)


# More than 1024 keys have one series more.
@pytest.mark.parametrize(
    ("keys", "scale"),
    [(60, 1.0), (60, 2.2), (60, 6.0), *((1100, s) for s in (1.0, 1.5, 2.0, 6.0))],
)
@pytest.mark.skipif(BACKEND == "torch", reason="nothing is compiled")
def test_one_compiled_program_takes_every_branch(keys, scale):
    rng = np.random.default_rng(9)
    query, upstream = normal(rng, 60, scale, 2), normal(rng, 60, 1, 2)
    arrays = [query, normal(rng, keys, scale, 2), normal(rng, keys, 1, 2), upstream]
    errors = relative_errors(value_and_gradients(*arrays, jit=True), reference(*arrays))
    assert max(errors) < 1e-5


@pytest.mark.parametrize(
    ("method", "scale", "length"),
    [
        ("auto", 0.5, 45),
        ("auto", 4.0, 45),
        ("auto", 0.5, 600),
        ("streaming", 0.5, 45),
        ("streaming", 4.0, 45),
    ],
)
def test_second_derivatives(method, scale, length):
    rng = np.random.default_rng(10)
    arrays = [normal(rng, length, s, 2) for s in (scale, scale, 1)]

    def loss(method, *tensors):
        return ops.sum(ops.sin(vector_attention(*tensors, method=method)))

    def hessian_product(method):
        directions = [ops.convert_to_tensor(np.cos(7 * a)) for a in arrays]
        tensors = [ops.convert_to_tensor(a) for a in arrays]
        if BACKEND == "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as outer:
                outer.watch(tensors)
                with tf.GradientTape() as inner:
                    inner.watch(tensors)
                    value = loss(method, *tensors)
                gradients = inner.gradient(value, tensors)
                total = sum(tf.reduce_sum(g * d) for g, d in zip(gradients, directions))
            return outer.gradient(total, tensors)
        if BACKEND == "jax":
            import jax

            def total(*tensors):
                gradients = jax.grad(lambda *t: loss(method, *t), (0, 1, 2))(*tensors)
                return sum(ops.sum(g * d) for g, d in zip(gradients, directions))

            return jax.grad(total, (0, 1, 2))(*tensors)
        import torch

        tensors = [t.detach().requires_grad_(True) for t in tensors]
        gradients = torch.autograd.grad(
            loss(method, *tensors), tensors, create_graph=True
        )
        total = sum((g * d).sum() for g, d in zip(gradients, directions))
        return torch.autograd.grad(total, tensors)

    expected = [ops.convert_to_numpy(x) for x in hessian_product("dense")]
    actual = [ops.convert_to_numpy(x) for x in hessian_product(method)]
    assert max(relative_errors(actual, expected)) < 1e-4


def test_force_method():
    rng = np.random.default_rng(11)
    q, k, v = normal(rng, 50, 100.0), normal(rng, 50), normal(rng, 50)
    with force_vector_attention_method("interpolated"):
        assert np.isnan(ops.convert_to_numpy(vector_attention(q, k, v))).any()
        named = vector_attention(q, k, v, method="streaming")
        assert not np.isnan(ops.convert_to_numpy(named)).any()
    assert not np.isnan(ops.convert_to_numpy(vector_attention(q, k, v))).any()
    with (
        pytest.raises(ValueError, match="argument `method`"),
        force_vector_attention_method("fast"),
    ):
        pass


@pytest.mark.tensorflow
@pytest.mark.parametrize("method", ["auto", "streaming"])
def test_no_pair_tensor_in_the_compiled_program(method):
    import re

    import tensorflow as tf

    tokens, channels = 160, 2

    @tf.function(jit_compile=True)
    def run(q, k, v):
        with tf.GradientTape() as tape:
            tape.watch([q, k, v])
            output = vector_attention(q, k, v, method=method)
        return tape.gradient(output, [q, k, v])

    tensors = [tf.zeros((1, tokens, channels))] * 3
    text = run.experimental_get_compiler_ir(*tensors)(stage="optimized_hlo")
    sizes = [
        np.prod([int(n) for n in shape.split(",")])
        for shape in re.findall(r"f32\[([\d,]+)\]", text)
    ]
    assert max(sizes) < tokens * tokens * channels / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "fast"}, r"argument `method`. Expected one of .*'fast'"),
        ({"num_terms": 8}, r"`num_terms` belongs to .*num_terms=8 with method='auto'"),
        ({"mask": np.ones((1, 4), bool)}, r"`mask` must have shape .*\(1, 4\)"),
        (
            {"mask": np.ones((1, 5, 5), bool), "method": "interpolated"},
            r"cannot take a mask of pairs",
        ),
        ({"dropout": 0.5, "method": "interpolated"}, r"cannot take dropout"),
        ({"key": np.ones((1, 5, 3), "float32")}, r"must have the same channels"),
        ({"key": np.ones((1, 4, 2), "float32")}, r"same number of tokens"),
        ({"query": np.ones((5, 2), "float32")}, r"must have rank 3 .*query \(5, 2\)"),
    ],
)
def test_bad_arguments(arguments, message):
    x = np.ones((1, 5, 2), "float32")
    with pytest.raises(ValueError, match=message):
        vector_attention(**{"query": x, "key": x, "value": x, **arguments})


@pytest.mark.tensorflow
def test_autograph_leaves_it_alone(monkeypatch):
    import tensorflow as tf

    context = tf.__internal__.autograph.control_status_ctx
    seen, frame = [], _series.frame
    monkeypatch.setattr(
        _series, "frame", lambda *x: seen.append(context().status) or frame(*x)
    )
    x = tf.zeros((1, 50, 2))

    @tf.function
    def function(x):
        seen.append(context().status)
        return vector_attention(x, x, x)

    function(x)
    outside, inside = (status.name for status in seen)
    assert outside == "ENABLED"
    assert inside != "ENABLED"


@pytest.mark.backends
@pytest.mark.skipif(BACKEND != "jax", reason="elsewhere there is no such compiler")
def test_definition_keeps_its_weights_apart_from_their_sum():
    import jax

    x = np.ones((1, 5, 2), "float32")
    lowered = jax.jit(lambda x: vector_attention(x, x, x, method="dense")).lower(x)
    assert "optimization_barrier" in lowered.as_text()
