"""The one contract that every layer of the package is tested against.

`run_layer_contract` runs on each Keras backend; its XLA and SavedModel parts run on the
TensorFlow backend only.
"""

import keras
import numpy as np
from keras import ops, tree

BACKEND = keras.backend.backend()


def random_like(shape, seed=0):
    """Standard normal float32 array."""
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def to_numpy(outputs):
    """Arrays of all output tensors, in order, as float32."""
    return [
        np.asarray(ops.convert_to_numpy(ops.cast(tensor, "float32")))
        for tensor in tree.flatten(outputs)
    ]


def assert_close(actual, expected, rtol=1e-5, message=""):
    """Asserts a relative 2-norm error of at most `rtol`, array by array."""
    actual, expected = to_numpy(actual), to_numpy(expected)
    assert len(actual) == len(expected), message
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape, f"{message}: shape {a.shape}, expected {e.shape}"
        error = np.linalg.norm(a - e) / max(np.linalg.norm(e), 1e-30)
        assert error <= rtol, f"{message}: relative error {error:.3g} > {rtol:.3g}"


def randomize_weights(model, seed=0, scale=0.3):
    """Replaces every weight, so that zero initializers do not hide a fault."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if variable.dtype not in ("float32", "float16", "bfloat16"):
            continue
        values = scale * rng.standard_normal(variable.shape)
        if variable.path.endswith("variance"):
            values = np.abs(values) + 0.5
        variable.assign(values.astype("float32"))


def gradients(model, inputs, seed=0):
    """Gradients, by variable path, of a random linear function of the outputs."""

    def loss_of(outputs):
        total = 0.0
        for index, output in enumerate(tree.flatten(outputs)):
            output = ops.cast(output, "float32")
            factors = ops.convert_to_tensor(
                random_like(tuple(output.shape), seed + index)
            )
            total = total + ops.sum(output * factors)
        return total

    variables = model.trainable_variables
    if not variables:
        return {}
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = loss_of(model(inputs, training=False))
        values = tape.gradient(loss, [v.value for v in variables])
        values = [None if v is None else np.asarray(v) for v in values]
    elif BACKEND == "jax":
        import jax

        state = [v.value for v in model.non_trainable_variables]

        def loss_fn(trainable):
            outputs, _ = model.stateless_call(trainable, state, inputs, training=False)
            return loss_of(outputs)

        values = jax.jit(jax.grad(loss_fn))([v.value for v in variables])
        values = [np.asarray(v.astype("float32")) for v in values]
    else:
        model.zero_grad()
        loss_of(model(inputs, training=False)).backward()
        values = [
            None if v.value.grad is None else v.value.grad.float().cpu().numpy()
            for v in variables
        ]
    return {v.path: g for v, g in zip(variables, values, strict=True)}


def call_compiled(model, inputs):
    """The outputs of a model; on JAX compiled as a whole, as `predict` does.

    Operation by operation, JAX compiles each of them for each shape, which takes most
    of the time of these tests.
    """
    if BACKEND != "jax":
        return model(inputs)
    import jax

    weights = [v.value for v in model.trainable_variables]
    state = [v.value for v in model.non_trainable_variables]
    function = jax.jit(lambda w, s, x: model.stateless_call(w, s, x)[0])
    return function(weights, state, inputs)


def functional_model(layer, input_shapes, unknown_batch=True, **call_arguments):
    """`layer` as a functional model; a list of shapes becomes a list of inputs."""

    def make_input(shape):
        if unknown_batch:
            return keras.Input(shape[1:])
        return keras.Input(batch_shape=shape)

    if isinstance(input_shapes, list):
        inputs = [make_input(shape) for shape in input_shapes]
    else:
        inputs = make_input(input_shapes)
    return keras.Model(inputs, layer(inputs, **call_arguments))


def run_layer_contract(
    make_layer,
    input_shapes,
    output_shape,
    tmp_path,
    num_weights=None,
    rtol=1e-5,
    mixed_rtol=5e-2,
    zero_gradients=(),
    **call_arguments,
):
    """Runs the whole contract on the layer that `make_layer(**kwargs)` returns.

    Args:
        make_layer: Function from base layer arguments (`dtype`, `name`) to a new layer.
        input_shapes: Shape with the batch axis, or a list of shapes for a layer that
            is called on a list.
        output_shape: Expected shape or list of shapes of the (flattened) outputs.
        tmp_path: Folder for the saved models.
        num_weights: Expected number of trainable numbers, if given.
        rtol: Tolerance of everything that must agree in float32.
        mixed_rtol: Tolerance of `mixed_bfloat16` against float32.
        zero_gradients: Endings of the paths of weights whose gradient is zero by
            construction (a key's bias, which a softmax ignores).
        **call_arguments: Passed to the layer's call.
    """
    is_list = isinstance(input_shapes, list)
    shapes = input_shapes if is_list else [input_shapes]
    expected = output_shape if isinstance(output_shape, list) else [output_shape]
    arrays = [random_like(shape, seed) for seed, shape in enumerate(shapes)]
    inputs = arrays if is_list else arrays[0]

    # Config round trip: every argument survives, JSON included.
    layer = make_layer(name="layer")
    config = layer.get_config()
    twin = layer.__class__.from_config(config)
    assert twin.get_config() == config
    assert (
        keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(layer)
        ).get_config()
        == config
    )

    # Symbolic and eager shapes agree, with a known and an unknown batch.
    known = functional_model(layer, input_shapes, False, **call_arguments)
    assert [tuple(t.shape) for t in known.outputs] == expected
    randomize_weights(layer)
    model = functional_model(layer, input_shapes, True, **call_arguments)
    assert [tuple(t.shape) for t in model.outputs] == [
        (None, *shape[1:]) for shape in expected
    ]
    eager = layer(inputs, **call_arguments)
    assert [tuple(t.shape) for t in tree.flatten(eager)] == expected
    for tensor, symbolic in zip(tree.flatten(eager), model.outputs, strict=True):
        assert keras.backend.standardize_dtype(tensor.dtype) == symbolic.dtype
    assert_close(call_compiled(model, inputs), eager, rtol, "functional against eager")
    if num_weights is not None:
        assert (
            sum(int(np.prod(v.shape)) for v in layer.trainable_weights) == num_weights
        )

    # Another batch size through the same model, example by example.
    single = call_compiled(model, [a[:1] for a in arrays] if is_list else inputs[:1])
    first = [tensor[:1] for tensor in to_numpy(eager)]
    assert_close(single, first, 10 * rtol, "one example against the batch")

    # `.keras` reload gives the same outputs and the same config.
    path = tmp_path / "model.keras"
    model.save(path)
    reloaded = keras.saving.load_model(path)
    assert_close(call_compiled(reloaded, inputs), eager, rtol, ".keras reload")
    assert reloaded.get_layer("layer").get_config() == config

    # Gradients reach every weight, and are finite.
    for name, gradient in gradients(model, inputs).items():
        assert gradient is not None, f"no gradient for {name}"
        assert np.all(np.isfinite(gradient)), f"gradient of {name} is not finite"
        if not name.endswith(tuple(zero_gradients)) or not zero_gradients:
            assert np.any(gradient != 0), f"gradient of {name} is zero"

    # Mixed precision: bfloat16 out, float32 weights, close to float32.
    mixed = make_layer(name="layer", dtype="mixed_bfloat16")
    mixed_model = functional_model(mixed, input_shapes, True, **call_arguments)
    mixed_model.set_weights(model.get_weights())
    outputs = call_compiled(mixed_model, inputs)
    for tensor, symbolic in zip(
        tree.flatten(outputs), mixed_model.outputs, strict=True
    ):
        assert keras.backend.standardize_dtype(tensor.dtype) == "bfloat16"
        assert symbolic.dtype == "bfloat16"
    assert all(v.dtype == "float32" for v in mixed.trainable_weights)
    assert_close(outputs, eager, mixed_rtol, "mixed_bfloat16")

    if BACKEND == "tensorflow":
        _run_tensorflow_contract(model, inputs, arrays, eager, tmp_path, rtol)


def _run_tensorflow_contract(model, inputs, arrays, eager, tmp_path, rtol):
    import tensorflow as tf

    compiled = tf.function(lambda x: model(x), jit_compile=True)
    assert_close(compiled(inputs), eager, rtol, "XLA against eager")

    path = str(tmp_path / "saved_model")
    model.export(path, verbose=False)
    restored = tf.saved_model.load(path)
    assert_close(restored.serve(inputs), eager, rtol, "SavedModel")
    if isinstance(inputs, list):
        single, first = [a[:1] for a in arrays], [t[:1] for t in to_numpy(eager)]
        assert_close(restored.serve(single), first, 10 * rtol, "SavedModel, batch of 1")
