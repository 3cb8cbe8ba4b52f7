import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

from tokenlearner_keras import models
from tokenlearner_keras.flops import count_flops, print_flops
from tokenlearner_keras.layers import TokenLearner, VectorAttention

pytestmark = pytest.mark.tensorflow

ROOT = Path(__file__).parent.parent


def one_layer(layer, shape, **call_arguments):
    inputs = keras.Input(shape)
    return keras.Model(inputs, layer(inputs, **call_arguments))


@keras.saving.register_keras_serializable(package="tokenlearner_keras_tests")
class Function(layers.Layer):
    """A custom layer around any function of tensors."""

    def __init__(self, function, output_shape=None, **kwargs):
        super().__init__(**kwargs)
        self.function = function
        self.shape_out = output_shape

    def call(self, x):
        return self.function(x)

    def compute_output_spec(self, x):
        return keras.KerasTensor((x.shape[0], *(self.shape_out or x.shape[1:])))


# Table 1 (384 pixels): parameters, MACs, the printed GFLOPS and ours.
TABLE_1 = [
    ("S/32", None, None, 22_914_664, 3_419_003_904, 3.4, 3.4),
    # The paper prints 19.8, which no 12 layers of B/32 can cost.
    ("B/32", None, None, 88_295_656, 12_953_303_040, 19.8, 13.0),
    ("B/16", None, None, 86_857_960, 55_378_163_712, 55.6, 55.6),
    ("S/32", None, 8, 22_944_808, 1_883_631_360, 1.9, 1.9),
    # The paper prints 28.7, which is the cost of 16 tokens.
    ("B/16", None, 8, 86_916_520, 28_230_710_016, 28.7, 28.4),
    ("S/32", 22, 8, 40_689_448, 3_308_302_080, 3.3, 3.3),
    ("B/32", 20, 8, 145_057_192, 11_425_708_800, 11.5, 11.5),
    ("B/16", 21, 8, 150_707_368, 46_860_202_752, 47.1, 47.1),
    ("B/16", 21, 16, 150_767_848, 47_519_228_928, 47.7, 47.7),
    ("B/16", None, 16, 86_977_000, 28_605_146_112, 28.7, 28.7),
]


@pytest.mark.parametrize(
    ("variant", "num_layers", "num_tokens", "params", "macs", "printed", "ours"),
    TABLE_1,
)
def test_table_1(variant, num_layers, num_tokens, params, macs, printed, ours):
    model = models.vit(
        variant,
        (384, 384, 3),
        num_layers=num_layers,
        num_tokens=num_tokens,
        token_learner="v10",
    )
    assert model.count_params() == params
    report = count_flops(model, "macs")
    # The integers above count the weighted pooling of TokenLearner as elementwise
    # work; here it is a matrix product of the layer itself, and so it is counted.
    pooling = report.by_sublayer.get("token_learner", 0)
    if num_tokens:
        positions = (384 // int(variant[2:])) ** 2
        channels = model.get_layer("token_learner").output.shape[-1]
        assert pooling == num_tokens * positions * channels
    assert report.total - pooling == macs
    gigaflops = count_flops(model, "xla").total / 1e9
    assert round(gigaflops, 1) == ours
    anomaly = (variant, num_layers, num_tokens) in [
        ("B/32", None, None),
        ("B/16", None, 8),
    ]
    assert (ours == printed) is not anomaly


def test_table_1_with_the_token_learner_of_the_paper():
    model = models.vit("S/32", (384, 384, 3), num_tokens=8, token_learner="v1")
    assert model.count_params() == 22_943_464
    assert round(count_flops(model, "xla").total / 1e9, 1) == 1.9


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (224, (0.81, 5.00, 9.18, 13.36, 17.54)),
        (384, (1.06, 14.71, 28.36, 42.01, 55.63)),
    ],
)
def test_figure_4_location_sweep(size, expected):
    # Blocks before the tokenizer cost the same wherever it stands, and so do those
    # behind it, so three models give the five points of the figure.
    def gigaflops(num_tokens, location):
        model = models.vit(
            "B/16", (size, size, 3), num_tokens=num_tokens, tokenizer_location=location
        )
        return count_flops(model, "xla").total / 1e9

    base, middle, first = gigaflops(None, 0.5), gigaflops(8, 0.5), gigaflops(8, 0)
    values = (first, (first + middle) / 2, middle, middle * 1.5 - first / 2, base)
    np.testing.assert_allclose(values, expected, atol=0.016)
    assert round(middle / base, 3) == {224: 0.523, 384: 0.510}[size]
    if size == 224:
        np.testing.assert_allclose(gigaflops(8, 0.75), values[3], rtol=1e-6)


def test_macs_by_hand():
    # Valid padding, strides, groups, depth multiplier.
    model = one_layer(layers.Conv2D(8, 3, strides=2, groups=2), (9, 9, 4))
    assert count_flops(model).total == 4 * 4 * 8 * 9 * 2
    model = one_layer(layers.DepthwiseConv2D(3, depth_multiplier=2), (9, 9, 4))
    assert count_flops(model).total == 7 * 7 * 9 * 4 * 2
    model = one_layer(layers.Conv1D(8, 3, dilation_rate=2), (9, 4))
    assert count_flops(model).total == 5 * 3 * 4 * 8
    dilated = layers.Conv2D(8, 3, padding="same", dilation_rate=2)
    # 9 positions have 3 taps each, of which 2 at either end meet the padding.
    assert count_flops(one_layer(dilated, (9, 9, 4))).total == 23 * 23 * 4 * 8
    model = one_layer(layers.Conv3D(5, (3, 1, 1)), (6, 4, 4, 2))
    assert count_flops(model).total == 4 * 16 * 3 * 2 * 5
    model = one_layer(layers.Dense(7), (5, 3))
    assert count_flops(model).total == 5 * 3 * 7
    model = one_layer(layers.Conv2DTranspose(8, 2, strides=2), (4, 4, 3))
    assert count_flops(model).total == 16 * 4 * 3 * 8


def test_padding_taps():
    # A row of 5 with a 3-tap kernel has 15 taps, of which 13 meet the input.
    model = one_layer(layers.Conv2D(2, 3, padding="same", use_bias=False), (5, 5, 3))
    assert count_flops(model, "macs").total == 13 * 13 * 3 * 2
    assert count_flops(model, "xla").total == 13 * 13 * 3 * 2
    assert count_flops(model, "tf_profiler").total == 2 * 15 * 15 * 3 * 2


def test_tf_profiler_equals_the_profiler_of_tensorflow():
    import tensorflow as tf

    x = inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, strides=2, padding="same")(x)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x)
    x = layers.DepthwiseConv2D(3, padding="same")(x)
    x = layers.MaxPooling2D(2)(x) + layers.AveragePooling2D(2)(x)
    x = layers.Reshape((4, 4, 4, 2))(x)
    x = layers.Conv3D(4, 3, padding="same")(x)
    x = layers.Reshape((64, 4))(x)
    x = layers.LayerNormalization()(x)
    x = ops.matmul(x, ops.transpose(x, (0, 2, 1))) * 0.5
    x = layers.Softmax()(x)
    x = ops.max(ops.square(x) - ops.log(x + 1.0), axis=1) / ops.cast(3.0, "float32")
    x = layers.Dense(10)(x)
    model = keras.Model(inputs, ops.sum(ops.power(ops.abs(x), 1.5), axis=-1))

    function = tf.function(lambda x: model(x, training=False))
    graph = function.get_concrete_function(tf.TensorSpec((1, 16, 16, 3))).graph
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    options["output"] = "none"
    expected = tf.compat.v1.profiler.profile(graph, options=options).total_float_ops
    assert expected > 100_000
    assert count_flops(model, "tf_profiler").total == expected


def cross_check_models():
    """Small models whose graphs are alike on the TensorFlow and the JAX backend."""
    dense = one_layer(layers.Dense(64), (50, 32))
    conv = one_layer(layers.Conv2D(12, 3, strides=2, padding="same"), (15, 15, 6))
    norm = one_layer(layers.LayerNormalization(epsilon=1e-6), (50, 64))
    softmax = one_layer(layers.Softmax(), (50, 64))
    x = inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(64, 8, 8)(x)
    x = layers.Reshape((16, 64))(x)
    for _ in range(2):
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        x = x + layers.MultiHeadAttention(4, 16)(y, y)
        y = layers.LayerNormalization(epsilon=1e-6)(x)
        y = keras.activations.gelu(layers.Dense(256)(y), approximate=True)
        x = x + layers.Dense(64)(y)
    x = layers.Dense(10)(layers.GlobalAveragePooling1D()(x))
    vit = keras.Model(inputs, x)
    return {"dense": dense, "conv": conv, "norm": norm, "softmax": softmax, "vit": vit}


def test_xla_agrees_with_the_cost_analysis_of_xla():
    code = (
        "import json, jax, numpy as np\n"
        "from tests.test_flops import cross_check_models\n"
        "flops = {}\n"
        "for name, model in cross_check_models().items():\n"
        "    weights = [v.value for v in model.trainable_variables]\n"
        "    rest = [v.value for v in model.non_trainable_variables]\n"
        "    f = lambda w, r, x: model.stateless_call(w, r, x, training=False)[0]\n"
        "    x = np.zeros((1, *model.input_shape[1:]), 'float32')\n"
        "    cost = jax.jit(f).lower(weights, rest, x).compile().cost_analysis()\n"
        "    flops[name] = cost['flops']\n"
        "print('RESULT' + json.dumps(flops))\n"
    )
    environment = {**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "RESULT" in result.stdout, result.stderr[-3000:]
    expected = json.loads(result.stdout.rpartition("RESULT")[2])
    for name, model in cross_check_models().items():
        total = count_flops(model, "xla").total
        np.testing.assert_allclose(total, expected[name] / 2, rtol=0.01, err_msg=name)


def test_layers_are_told_apart():
    # "dense" runs twice, so TensorFlow names its second scope "dense_1", as is the
    # name of another layer.
    shared = layers.Dense(4, use_bias=False, name="dense")
    other = layers.Dense(8, use_bias=False, name="dense_1")
    x = inputs = keras.Input((4,))
    x = other(shared(shared(x)))
    inner_in = keras.Input((8,))
    inner = keras.Model(
        inner_in, layers.Dense(2, use_bias=False, name="dense")(inner_in), name="inner"
    )
    model = keras.Model(inputs, inner(x))
    report = count_flops(model)
    assert report.by_layer == {"dense": 32, "dense_1": 32, "inner": 16}
    assert report.by_sublayer == {"dense": 32, "dense_1": 32, "inner/dense": 16}
    assert report.total == 80
    # Counting leaves no trace on the layers.
    assert all("call" not in vars(layer) for layer in (shared, other, inner))
    np.testing.assert_array_equal(model(np.ones((2, 4))).shape, (2, 2))


def test_sums_agree():
    model = models.vit("Ti/16", (32, 32, 3), num_layers=2, num_tokens=2)
    for convention in ("macs", "tf_profiler", "xla"):
        report = count_flops(model, convention)
        assert report.convention == convention
        assert sum(report.by_layer.values()) == report.total
        assert sum(report.by_sublayer.values()) == report.total
        assert report.uncounted == {}
        assert report.by_layer["block_0"] > report.by_layer["block_1"] > 0


def test_custom_layers_loops_branches_and_dead_code():
    import tensorflow as tf

    weights = np.ones((6, 6), "float32")

    def loop(x):
        return tf.while_loop(
            lambda i, y: i < 7, lambda i, y: (i + 2, y @ weights), (0, x)
        )[1]

    assert count_flops(one_layer(Function(loop), (6,))).total == 4 * 36

    def branch(x):
        return tf.cond(tf.reduce_sum(x) > 0, lambda: x @ weights @ weights, lambda: x)

    assert count_flops(one_layer(Function(branch), (6,))).total == 72

    def dead(x):
        x @ weights
        return x

    assert count_flops(one_layer(Function(dead), (6,))).total == 0

    compiled = tf.function(lambda x: x @ weights, jit_compile=True)
    report = count_flops(one_layer(Function(compiled, name="custom"), (6,)))
    assert report.by_layer == {"custom": 36}

    def endless(x):
        return tf.while_loop(
            lambda y: tf.reduce_sum(y) < 9.0, lambda y: (y @ weights,), (x,)
        )[0]

    report = count_flops(one_layer(Function(endless), (6,)))
    assert report.total == 36
    assert list(report.uncounted) == [
        "StatelessWhile (unknown trip count, counted once)"
    ]


def test_unknown_operations_are_listed():
    import tensorflow as tf

    model = one_layer(
        Function(lambda x: tf.linalg.cholesky(x) + tf.linalg.inv(x)), (3, 3)
    )
    for convention in ("macs", "tf_profiler", "xla"):
        assert count_flops(model, convention).uncounted == {
            "Cholesky": 1,
            "MatrixInverse": 1,
        }
    lines = []
    print_flops(model, print_fn=lines.append)
    assert lines[-1].startswith("Not counted, because no rule knows them: ")
    assert "Cholesky (x1)" in lines[-1]


def test_einsum():
    def count(equation, *shapes, convention="macs"):
        inputs = [keras.Input(shape) for shape in shapes]
        model = keras.Model(inputs, ops.einsum(equation, *inputs))
        return count_flops(model, convention).total

    assert count("bqhd,bkhd->bhqk", (5, 3, 4), (7, 3, 4)) == 3 * 5 * 7 * 4
    # Nothing is summed: products, not multiply-adds.
    pairs = ("bqd,bkd->bqkd", (5, 4), (7, 4))
    assert count(*pairs) == 0
    assert count(*pairs, convention="tf_profiler") == 5 * 7 * 4


def test_vector_attention_is_counted_as_its_definition():
    auto = one_layer(VectorAttention(), (40, 6))
    dense = one_layer(VectorAttention(method="dense"), (40, 6))
    for convention in ("macs", "tf_profiler", "xla"):
        total = count_flops(auto, convention).total
        assert total == count_flops(dense, convention).total
    # q, k, v; then product, (scale,) softmax 5, weighting and sum over the pairs.
    pairs = 40 * 40 * 6
    flops = count_flops(auto, "tf_profiler").total
    assert 3 * 2 * 40 * 36 + 8 * pairs <= flops <= 3 * 2 * 40 * 36 + 9.1 * pairs


def test_huge_models_are_traced_not_run():
    # The attention weights alone would take 64 TB.
    model = one_layer(TokenLearner.video(8), (4_000_000, 4, 2, 64))
    assert count_flops(model).total > 1e10
    x = inputs = keras.Input((4_000_000, 64))
    model = keras.Model(inputs, layers.MultiHeadAttention(1, 64)(x, x))
    assert count_flops(model).total > 2 * 64 * 4_000_000**2


def test_open_sizes_several_inputs_and_sequential_models():
    x = inputs = keras.Input((None, None, 3))
    x = layers.Conv2D(4, 1)(x)
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(x))
    assert count_flops(model, input_shape=(8, 6, 3)).total == 8 * 6 * 12
    with pytest.raises(ValueError, match=r"is not known: pass `input_shape`.*None"):
        count_flops(model)
    with pytest.raises(
        ValueError, match=r"must fit the inputs.*input_shape=\(8, 6, 4\)"
    ):
        count_flops(model, input_shape=(8, 6, 4))

    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((None,), name="b")}
    outputs = layers.Dense(3)(layers.Concatenate()([inputs["a"], inputs["a"]]))
    model = keras.Model(inputs, [outputs, inputs["b"] * 2.0])
    assert count_flops(model, input_shape=[(4,), (5,)]).total == 24

    model = keras.Sequential([keras.Input((32,)), layers.Dense(10)])
    assert count_flops(model).total == 320


def test_dtype_does_not_change_macs():
    model = models.vit("Ti/16", (32, 32, 3), num_layers=1, dtype="mixed_bfloat16")
    twin = models.vit("Ti/16", (32, 32, 3), num_layers=1)
    assert count_flops(model).total == count_flops(twin).total


def test_print_flops():
    model = models.vit("S/32", (64, 64, 3), num_layers=2, num_tokens=2, name="small")
    lines = []
    report = print_flops(model, "xla", print_fn=lines.append)
    assert report.total == count_flops(model, "xla").total
    assert lines[0] == "small: FLOPs/2 of one example (convention: xla)"
    assert lines[1].split() == ["layer", "parameters", "FLOPs/2", "share"]
    rows = {line.split()[0]: line.split() for line in lines}
    assert rows["block_0"][1] == f"{model.get_layer('block_0').count_params():,}"
    assert rows["block_0"][2:4] == [
        f"{report.by_layer['block_0'] / 1e6:.3f}",
        "M",
    ]
    assert rows["total"][1] == f"{model.count_params():,}"
    lines = []
    print_flops(model, sublayers=True, print_fn=lines.append)
    assert any(line.startswith("block_0/attention/query ") for line in lines)


def test_bad_input():
    model = one_layer(layers.Dense(1), (2,))
    with pytest.raises(ValueError, match=r"argument `convention`.*convention='flops'"):
        count_flops(model, "flops")

    class Subclassed(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="must be a Keras model with known inputs"):
        count_flops(Subclassed())
