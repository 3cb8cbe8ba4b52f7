"""A TokenLearner inside an existing functional model, and out of it again.

The model is read as a graph, not by the names of its layers. Nested models, and layers
that hold a whole encoder, are taken apart into the layers that they call. Places where
the tokens can be replaced are the tensors of shape (batch, tokens, channels) that all
later computation passes through; a block is what lies between two of them and mixes
tokens.
"""

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable

import keras
import numpy as np
from keras import ops, tree

from tokenlearner_keras.layers import TokenLearner, VectorAttention
from tokenlearner_keras.layers._checks import (
    check_grid_shape,
    check_positive_int,
    resolve_grid,
)
from tokenlearner_keras.layers.activations import gelu

NOTHING = "nothing"  # name of the symbolic tensor that stands for a returned `None`
VARIANTS = ("v1", "video", "v10", "v11")
ATTENTION_LAYERS = (
    keras.layers.MultiHeadAttention,
    keras.layers.GroupQueryAttention,
    keras.layers.Attention,
    keras.layers.AdditiveAttention,
    VectorAttention,
)


@dataclasses.dataclass(frozen=True)
class InsertionPlace:
    """A place of a model where its tokens can be replaced by fewer.

    Args:
        index: int. The place is before block `index`.
        layer: str. Name of the first layer after the place.
        num_tokens: int. Number of tokens there, class and register tokens included.
        channels: int. Their channels.
    """

    index: int
    layer: str
    num_tokens: int
    channels: int

    def __str__(self):
        return (
            f"{self.index}: before layer '{self.layer}' "
            f"({self.num_tokens} tokens of {self.channels} channels)"
        )


def insertion_places(model: keras.Model) -> list[InsertionPlace]:
    """Lists the places where `insert_token_learner` can put a TokenLearner.

    Args:
        model: A functional model.

    Returns:
        One `InsertionPlace` for each block that mixes tokens, in order.

    Raises:
        ValueError: if `model` is not functional.
    """
    return _Chain(_Program.of(model)).places


def insert_token_learner(
    model: keras.Model,
    location: float | int | str = 0.5,
    num_tokens: int = 8,
    token_learner: str | Callable[[int], keras.layers.Layer] | None = None,
    share_weights: bool = False,
    num_prefix_tokens: int | None = None,
    num_suffix_tokens: int | None = None,
    grid_shape: tuple[int, ...] | None = None,
    regions_from=None,
    name: str = "token_learner",
    **token_learner_arguments,
) -> keras.Model:
    """Returns `model` with a TokenLearner inserted between two of its blocks.

    The patch tokens at the place are replaced by `num_tokens` learned tokens; all
    later blocks then work on these (section 4 of
    [TokenLearner](https://arxiv.org/abs/2106.11297v1)). Class and register tokens stay
    as they are. The model's own weights are kept, and what it computes before the
    place does not change.

    Any functional model whose tokens keep one shape `(batch, tokens, channels)` is
    served: those of `tokenlearner_keras.models`, KerasHub's ViT, DeiT and DINOv2
    backbones and classifiers, your own. Special tokens and the grid of the patches are
    found by passing images through the embedding: special tokens do not depend on the
    image, and patches of the left edge are one row apart.

    Args:
        model: A functional model.
        location: Where the TokenLearner stands. A float in [0, 1): before block
            `floor(location * blocks)`. An int: before the block with that index. A
            string: before the layer with that name, as `insertion_places` gives it.
        num_tokens: int. Number of learned tokens (for each frame of a video).
        token_learner: `"v1"`, `"video"`, `"v10"`, `"v11"`, a function from
            `num_tokens` to a layer, or `None` for `TokenLearner(num_tokens)`.
        share_weights: bool. Whether the new model uses the very layers of `model`, so
            that training one trains both. By default the layers are copied.
        num_prefix_tokens: int or `None`. Number of class and register tokens before the
            patches; `None` finds it.
        num_suffix_tokens: int or `None`. Number of special tokens after the patches;
            `None` finds it.
        grid_shape: `(height, width)` of the patches, or `(time, height, width)` for a
            video; `None` finds it.
        regions_from: Array of inputs of `model` (a batch of unlabelled images), or
            `None`. If given, the TokenLearner starts as pooling over `num_tokens`
            regions spread over the image (see `initialize_as_regions`), else from its
            initializers.
        name: str. Name of the TokenLearner layer.
        **token_learner_arguments: Further arguments of `TokenLearner`, such as
            `bottleneck_dim`.

    Returns:
        A functional `keras.Model`, not compiled, with the inputs of `model`. Nested
        models that hold the blocks are flattened. `remove_token_learner` undoes it.

    Raises:
        ValueError: if the model has no such place, `location` names none, the special
            tokens or the grid cannot be found, or the layers after the place need the
            full number of tokens. The message lists the candidate places.

    Example:

    >>> faster = insert_token_learner(vit, location=0.5, num_tokens=8)
    >>> faster.predict(images).shape == vit.predict(images).shape
    True
    """
    check_positive_int("num_tokens", num_tokens)
    program = _Program.of(model)
    chain = _Chain(program)
    place = chain.find(location)
    key = chain.starts[place.index]
    prefix, suffix, grid_shape = _token_layout(
        program, chain, num_prefix_tokens, num_suffix_tokens, grid_shape
    )
    num_positions = math.prod(grid_shape)
    frames = grid_shape[0] if len(grid_shape) == 3 else 1
    if num_tokens * frames > num_positions:
        raise ValueError(
            "Argument `num_tokens` must be at most the number of patch tokens. "
            f"Received: num_tokens={num_tokens} for a grid of {grid_shape}"
        )
    builder = _Builder(model, program, share_weights)
    name = builder.reserve(name)
    learner = _make_token_learner(
        token_learner, num_tokens, grid_shape, name, token_learner_arguments
    )

    def insert(tokens):
        x = tokens
        if prefix or suffix:
            x = keras.layers.Cropping1D((prefix, suffix), name=f"{name}_patches")(x)
        if len(grid_shape) == 3:
            shape = (*grid_shape, place.channels)
            x = keras.layers.Reshape(shape, name=f"{name}_grid")(x)
        parts = [learner(x)]
        if prefix:
            crop = (0, place.num_tokens - prefix)
            parts.insert(
                0, keras.layers.Cropping1D(crop, name=f"{name}_prefix")(tokens)
            )
        if suffix:
            crop = (place.num_tokens - suffix, 0)
            parts.append(keras.layers.Cropping1D(crop, name=f"{name}_suffix")(tokens))
        if len(parts) == 1:
            return parts[0]
        return keras.layers.Concatenate(axis=1, name=f"{name}_concat")(parts)

    try:
        new_model = builder.build({key: insert})
    except _CannotBuild as error:
        raise ValueError(
            f"Cannot insert a TokenLearner into model '{model.name}' at place "
            f"{place}: {error}\n{chain.describe()}"
        ) from error
    if regions_from is not None:
        # A list of one input, given one array, makes Keras warn.
        inputs = new_model.inputs
        inputs = inputs[0] if len(inputs) == 1 else inputs
        part = keras.Model(inputs, new_model.get_layer(name).input)
        features = [
            ops.convert_to_numpy(ops.cast(part(batch, training=False), "float32"))
            for batch in np.array_split(regions_from, -(-len(regions_from) // 64))
        ]
        features = np.concatenate(features)
        initialize_as_regions(learner, features)
    return new_model


def remove_token_learner(
    model: keras.Model, name: str | None = None, share_weights: bool = False
) -> keras.Model:
    """Returns `model` without its TokenLearner: the inverse of `insert_token_learner`.

    The patch tokens pass on as they are. For a model made by `insert_token_learner`
    that was not trained since, the outputs are those of the original, exactly.

    Args:
        model: A functional model that holds a `TokenLearner`.
        name: str or `None`. Name of the TokenLearner to remove; `None` removes all.
        share_weights: bool. Whether the new model uses the very layers of `model`
            rather than copies.

    Returns:
        A functional `keras.Model`, not compiled.

    Raises:
        ValueError: if the model has no such TokenLearner, or the layers after it
            cannot take the full number of tokens.
    """
    program = _Program.of(model)
    found = [
        step
        for step in program.steps
        if isinstance(step.op, TokenLearner) and name in (None, step.op.name)
    ]
    if not found:
        present = [s.op.name for s in program.steps if isinstance(s.op, TokenLearner)]
        raise ValueError(
            f"Argument `name` must be the name of a TokenLearner of model "
            f"'{model.name}', which has {present}. Received: name={name!r}"
        )
    producers = {key: step for step in program.steps for key in step.outputs}
    skip, aliases, identities = set(), {}, {}
    for step in found:
        tokens, source = step.outputs[0], step.inputs[0]
        for consumer in [s for s in program.steps if tokens in s.inputs]:
            whole = _reassembled(consumer, tokens, producers)
            if whole is not None:
                # Crop, learn and concatenate become the tensor that was cropped.
                aliases[consumer.outputs[0]] = whole
                skip.add(id(consumer))
        identities[tokens] = source
        skip.add(id(step))

    builder = _Builder(model, program, share_weights)

    def flatten(source):
        if len(source.shape) == 3:
            return source
        shape = (math.prod(source.shape[1:-1]), source.shape[-1])
        return keras.layers.Reshape(shape, name=builder.reserve("patches"))(source)

    try:
        return builder.build({}, skip, aliases, identities, flatten)
    except _CannotBuild as error:
        raise ValueError(
            f"Cannot remove the TokenLearner of model '{model.name}': {error}"
        ) from error


def initialize_as_regions(token_learner: TokenLearner, features) -> TokenLearner:
    """Sets the weights of a TokenLearner so that it pools over spread regions.

    Without any training, token `s` becomes an average over region `s` of the image;
    the regions are `num_tokens` smooth cells of a regular grid. The maps are functions
    of the features alone, so this fits where a position is a linear function of its
    features (least squares, closed form), which position embeddings make possible.

    Args:
        token_learner: A built `TokenLearner`. With `pooling="sum"` a token has the
            scale of a patch. A mean of sigmoid maps cannot: its tokens are about
            `1 / num_tokens` of that.
        features: Array `(images, positions, channels)`, `(images, height, width,
            channels)` or `(videos, time, height, width, channels)`: inputs of the
            layer for a batch.

    Returns:
        `token_learner`, its weights set and trainable as before.

    Raises:
        ValueError: if `token_learner` is not a built `TokenLearner`, or `features` do
            not fit it.
    """
    if not isinstance(token_learner, TokenLearner) or not token_learner.built:
        raise ValueError(
            "Argument `token_learner` must be a built TokenLearner. "
            f"Received: token_learner={token_learner!r}"
        )
    features = np.asarray(features, "float32")
    if features.ndim not in (3, 4, 5):
        raise ValueError(
            "Argument `features` must have shape (images, positions, channels), "
            "(images, height, width, channels) or (videos, time, height, width, "
            f"channels). Received: shape {features.shape}"
        )
    if features.ndim == 3:
        height, width = resolve_grid(
            token_learner, features.shape[1], token_learner.grid_shape
        )
    else:
        height, width = features.shape[-3:-1]
    x = features.reshape((-1, features.shape[-1]))
    if token_learner.use_norm:
        x = ops.convert_to_numpy(ops.cast(token_learner.norm(x), "float32"))
    x = np.asarray(x, "float64")
    regions = region_maps(token_learner.num_tokens, height, width)
    regions = regions.reshape((len(regions), -1)).T
    logits = _region_logits(token_learner, regions)
    logits = np.tile(logits, (len(x) // len(logits), 1))
    _fit_attention(token_learner, x, logits)
    if token_learner.value_dim == features.shape[-1]:
        token_learner.value_dense.kernel.assign(np.eye(token_learner.value_dim))
    return token_learner


def region_maps(num_regions: int, height: int, width: int) -> np.ndarray:
    """Smooth maps of regions that are spread evenly over a grid.

    Args:
        num_regions: int. Number of regions.
        height: int. Rows of the grid.
        width: int. Columns of the grid.

    Returns:
        Array `(num_regions, height, width)`. Each map is a bump around the centre of
        its region and sums to 1.
    """
    # The split of `num_regions` into rows whose cells are closest to square.
    best = min(
        range(1, num_regions + 1),
        key=lambda r: (
            abs(math.log((height / r) / (width / math.ceil(num_regions / r)))),
            r,
        ),
    )
    counts = [len(part) for part in np.array_split(np.arange(num_regions), best)]
    y, x = np.meshgrid(
        (np.arange(height) + 0.5) / height,
        (np.arange(width) + 0.5) / width,
        indexing="ij",
    )
    maps = []
    for row, count in enumerate(counts):
        for column in range(count):
            dy = (y - (row + 0.5) / len(counts)) * len(counts)
            dx = (x - (column + 0.5) / count) * count
            maps.append(np.exp(-2 * (dy**2 + dx**2)))
    maps = np.stack(maps)
    return maps / maps.sum((1, 2), keepdims=True)


def _region_logits(layer, regions):
    """Logits whose maps pool over `regions`, `(positions, num_tokens)`."""
    relative = regions / regions.max(0)
    if layer.activation == "softmax":
        return np.log(np.clip(relative, math.exp(-4), None))
    if layer.pooling == "mean":
        return 8 * relative - 4
    # A sum of sigmoids: the maps themselves must sum to one.
    maps = np.clip(regions, regions.max(0) / 50, 0.9)
    return np.log(maps / (1 - maps))


def _least_squares(x, y, use_bias):
    """Ridge regression with a strength that only guards against singular `x`."""
    mean_x = x.mean(0) if use_bias else np.zeros(x.shape[1])
    mean_y = y.mean(0) if use_bias else np.zeros(y.shape[1])
    x, y = x - mean_x, y - mean_y
    gram = x.T @ x
    strength = 1e-4 * np.trace(gram) / len(gram) + 1e-12
    kernel = np.linalg.solve(gram + strength * np.eye(len(gram)), x.T @ y)
    return kernel, mean_y - mean_x @ kernel


def _fit_attention(layer, x, logits):
    """Sets the attention function of `layer` to map `x` to about `logits`."""
    weights = layer.attention_layers
    if layer.attention == "mlp":
        # A softmax over the positions does not see a constant: none must be fitted.
        free = layer.use_bias or layer.activation == "softmax"
        kernel, bias = _least_squares(x, logits, free)
        if not layer.use_bias:
            bias = np.zeros_like(bias)
        # gelu(a) - gelu(-a) = a: pairs of hidden channels pass numbers on exactly.
        u, s, vt = np.linalg.svd(np.vstack([kernel, bias]), full_matrices=False)
        rank = min(len(vt), layer.bottleneck_dim // 2)
        first, second = u[:, :rank] * s[:rank], vt[:rank]
        hidden = np.zeros((len(kernel) + 1, layer.bottleneck_dim))
        hidden[:, :rank], hidden[:, rank : 2 * rank] = first, -first
        out = np.zeros((layer.bottleneck_dim, len(vt)))
        out[:rank], out[rank : 2 * rank] = second, -second
        weights[0].kernel.assign(hidden[:-1])
        weights[1].kernel.assign(out)
        if layer.use_bias:
            weights[0].bias.assign(hidden[-1])
            weights[1].bias.assign(np.zeros(len(vt)))
        return
    centre = (layer.kernel_size - 1) // 2
    # gelu(a) is about a from 3 on: hidden channels stay there.
    shifted = logits - logits.min() + 3
    for index, conv in enumerate(weights):
        is_last = index == len(weights) - 1
        target = logits if is_last else shifted
        kernel, bias = _least_squares(x, target, layer.use_bias)
        values = np.zeros(conv.kernel.shape)
        values[centre, centre] = kernel
        conv.kernel.assign(values)
        if layer.use_bias:
            conv.bias.assign(bias)
        x = np.asarray(
            ops.convert_to_numpy(gelu(ops.convert_to_tensor(x @ kernel + bias)))
        )


class _CannotBuild(Exception):
    """A layer refused its input, or could not be copied."""


@dataclasses.dataclass(eq=False)
class _Step:
    """One call of an operation: `arguments` with `tensors` filled in."""

    op: keras.Operation
    arguments: object
    tensors: list  # ids of the symbolic tensors in `arguments`
    inputs: list  # keys of the values that they stand for
    outputs: list  # keys of its outputs
    returns_none: bool  # whether it returns `None` beside them

    def call(self, op, values):
        filled = dict(zip(self.tensors, (values[key] for key in self.inputs)))
        args, kwargs = self.arguments.fill_in(filled)
        outputs = tree.flatten(op(*args, **kwargs))
        return [x for x in outputs if x is not None]


class _Program:
    """The calls of a graph in order, nested models and encoder layers taken apart."""

    def __init__(self):
        self.steps = []
        self.specs = {}  # key: (shape, dtype)
        self.inputs = []
        self.outputs = []
        self._keys = itertools.count()
        self._alive = []  # the ids in `tensors` are those of living objects

    @classmethod
    def of(cls, model):
        """The program of a functional model."""
        if isinstance(model, keras.Sequential) and model.built:
            function = model._functional
        else:
            function = model
        if not isinstance(function, keras.Function):
            raise ValueError(
                "Argument `model` must be a functional Keras model: its layers can "
                "only be found in a graph. "
                f"Received: model={model!r} of type {type(model).__name__}"
            )
        program = cls()
        program._trace_function(function)
        return program

    def _trace_function(self, function):
        scope = {}
        for tensor in function.inputs:
            self.inputs.append(self._new_key(tensor))
            scope[id(tensor)] = self.inputs[-1]
        self._expand(function, scope)
        self.outputs = [scope[id(tensor)] for tensor in function.outputs]

    def _new_key(self, tensor):
        key = next(self._keys)
        self.specs[key] = (tuple(tensor.shape), tensor.dtype)
        return key

    def _expand(self, function, scope):
        self._alive.append(function)
        # The nodes of a Function in the order in which it runs them.
        for depth in sorted(function._nodes_by_depth, reverse=True):
            for node in function._nodes_by_depth[depth]:
                if node.is_input or any(id(t) not in scope for t in node.input_tensors):
                    continue
                inner = _inner_function(node)
                if inner is None:
                    tensors = [t for t in node.outputs if t.name != NOTHING]
                    outputs = [self._new_key(tensor) for tensor in tensors]
                    self.steps.append(
                        _Step(
                            node.operation,
                            node.arguments,
                            [id(t) for t in node.input_tensors],
                            [scope[id(t)] for t in node.input_tensors],
                            outputs,
                            len(tensors) < len(node.outputs),
                        )
                    )
                    for tensor, key in zip(tensors, outputs):
                        scope[id(tensor)] = key
                else:
                    inner_scope = {
                        id(x): scope[id(y)]
                        for x, y in zip(inner.inputs, node.input_tensors)
                    }
                    self._expand(inner, inner_scope)
                    for tensor, x in zip(node.outputs, inner.outputs):
                        scope[id(tensor)] = inner_scope[id(x)]


def _inner_function(node):
    """The graph inside a nested model or encoder layer; `None` to keep it whole."""
    op = node.operation
    if not isinstance(op, keras.layers.Layer):
        return None
    inner = None
    if isinstance(op, keras.Sequential):
        inner = op._functional
    elif isinstance(op, keras.Function):
        inner = op
    elif _is_custom(op) and _may_hold_blocks(node):
        inner = _trace_layer(node)
    if inner is None or len(inner.inputs) != len(node.input_tensors):
        return None
    if any(
        len(x.shape) != len(y.shape) for x, y in zip(inner.inputs, node.input_tensors)
    ):
        return None
    if len(inner.outputs) > len(node.outputs):
        return None
    program = _Program()
    program._trace_function(inner)
    # One block stays one layer; an encoder of several is taken apart.
    return inner if _Chain(program).num_blocks > 1 else None


def _may_hold_blocks(node):
    """Whether a layer maps tokens to tokens and has more or less than one attention.

    A quick look before a trace: a layer with one attention is one block. One with none
    may have an attention that is written out.
    """
    shapes = [tuple(t.shape) for t in node.input_tensors]
    tokens = [shape for shape in shapes if len(shape) == 3]
    held = node.operation._flatten_layers(include_self=True)
    count = sum(isinstance(layer, ATTENTION_LAYERS) for layer in held)
    return count != 1 and any(tuple(t.shape) in tokens for t in node.outputs)


def _is_custom(layer):
    return not type(layer).__module__.startswith("keras.") and bool(
        list(layer._flatten_layers(include_self=False))
    )


def _trace_layer(node):
    """The graph of the layers that a layer calls, or `None` if it has no such graph."""
    layer = node.operation
    if not layer.built or any(
        keras.backend.standardize_dtype(t.dtype) != layer.compute_dtype
        for t in node.input_tensors
    ):
        return None  # the layer's own cast of its input would be lost
    replaced = {
        id(t): keras.KerasTensor(t.shape, dtype=t.dtype) for t in node.input_tensors
    }
    children = list(layer._flatten_layers(include_self=False, recursive=False))
    try:
        with _TensorOutputs(children):
            args, kwargs = node.arguments.fill_in(replaced)
            outputs = tree.flatten(layer.call(*args, **kwargs))
        tensors = [x for x in outputs if isinstance(x, keras.KerasTensor)]
        function = keras.Function(
            [replaced[id(t)] for t in node.input_tensors], tensors
        )
    except Exception:  # whatever a foreign `call` does not take symbolically
        return None
    # A weight used outside of any sublayer would not belong to the new model.
    held = [
        x
        for nodes in function._nodes_by_depth.values()
        for inner in nodes
        if not inner.is_input
        for x in tree.flatten((inner.arguments.args, inner.arguments.kwargs))
        if isinstance(x, keras.Variable)
    ]
    if held:
        return None
    # Outputs that are no symbolic tensors (empty place holders) must come last.
    positions = [isinstance(x, keras.KerasTensor) for x in outputs]
    return function if positions == sorted(positions, reverse=True) else None


class _TensorOutputs:
    """Lets layers that return `None` beside their tensors be called symbolically."""

    def __init__(self, layers):
        self.layers = layers

    def __enter__(self):
        for layer in self.layers:

            def symbolic_call(*args, _layer=layer, **kwargs):
                return tree.map_structure(
                    lambda x: keras.KerasTensor((), name=NOTHING) if x is None else x,
                    _layer.compute_output_spec(*args, **kwargs),
                )

            # Not `setattr`, which would track it as state of the layer.
            layer.__dict__["symbolic_call"] = symbolic_call
        return self

    def __exit__(self, *error):
        for layer in self.layers:
            layer.__dict__.pop("symbolic_call", None)


def _mixes_tokens(step, program):
    """Whether a call lets tokens see one another."""
    op = step.op
    if isinstance(op, keras.layers.Layer):
        held = op._flatten_layers(include_self=True)
        if any(isinstance(layer, ATTENTION_LAYERS) for layer in held):
            return True
        if not _is_custom(op):
            return False
        node = next(
            (n for n in op._inbound_nodes if n.arguments is step.arguments), None
        )
        inner = None if node is None else _trace_layer(node)
        if inner is None:
            return False
        traced = _Program()
        traced._trace_function(inner)
        return any(_mixes_tokens(s, traced) for s in traced.steps)
    if type(op).__name__ == "DotProductAttention":
        return True
    if len(step.inputs) < 2 or len(step.outputs) != 1:
        return False
    # A product of two tensors that is not element by element.
    shapes = [program.specs[key][0] for key in step.inputs]
    output = program.specs[step.outputs[0]][0]
    ones = [tuple(1 if d is None else d for d in shape) for shape in shapes]
    try:
        return np.broadcast_shapes(*ones) != tuple(
            1 if d is None else d for d in output
        ) and not _is_concatenation(shapes, output)
    except ValueError:
        return not _is_concatenation(shapes, output)


def _is_concatenation(shapes, output):
    if any(len(shape) != len(output) for shape in shapes):
        return False
    differing = [
        axis
        for axis, size in enumerate(output)
        if any(shape[axis] != size for shape in shapes)
    ]
    if len(differing) != 1:
        return False
    sizes = [shape[differing[0]] for shape in shapes]
    return None not in sizes and sum(sizes) == output[differing[0]]


class _Chain:
    """The tensors of one shape (batch, tokens, channels) that all else passes through.

    `places[i]` is before block `i`; `starts[i]` is the key of the tensor there, and
    `first` that of the first tensor of the chain.
    """

    def __init__(self, program):
        self.program = program
        self.starts, self.places, self.first = [], [], None
        chain = self._longest_chain()
        self.num_blocks = len(self.starts)
        if chain:
            self.first = chain[0][1]

    def _longest_chain(self):
        program = self.program
        last_use = {}
        for index, step in enumerate(program.steps):
            for key in step.inputs:
                last_use[key] = index
        if program.steps:
            # The end of a model without a head closes its last block.
            for key in program.steps[-1].outputs:
                if key in program.outputs:
                    last_use[key] = len(program.steps)
        live = {key for key in program.inputs if key in last_use}
        cuts = [(-1, next(iter(live)))] if len(live) == 1 else []
        for index, step in enumerate(program.steps):
            live |= set(step.outputs) & last_use.keys()
            live = {key for key in live if last_use[key] > index}
            if len(live) == 1:
                key = next(iter(live))
                if not cuts or cuts[-1][1] != key:
                    cuts.append((index, key))
        groups = {}
        for index, key in cuts:
            shape = program.specs[key][0]
            if len(shape) == 3 and None not in shape[1:] and shape[1] > 1:
                groups.setdefault(shape[1:], []).append((index, key))
        best = []
        for shape, group in groups.items():
            # What follows the last tensor of the chain is the head, no block.
            segments = [
                program.steps[a + 1 : b + 1]
                for (a, _), (b, _) in itertools.pairwise(group)
            ]
            blocks = [
                any(_mixes_tokens(step, program) for step in segment)
                for segment in segments
            ]
            if not any(blocks):
                blocks = self._repeated(segments)
            starts = [
                (group[i][1], segments[i][0].op.name)
                for i, is_block in enumerate(blocks)
                if is_block
            ]
            if len(starts) > len(self.starts) or not best:
                best = group
                self.starts = [key for key, _ in starts]
                self.places = [
                    InsertionPlace(i, layer, *shape)
                    for i, (_, layer) in enumerate(starts)
                ]
        return best

    def _repeated(self, segments):
        """Blocks without attention: what has weights and occurs more than once."""

        def signature(segment):
            return tuple(
                (type(s.op), tuple(tuple(w.shape) for w in s.op.weights))
                for s in segment
                if isinstance(s.op, keras.layers.Layer) and s.op.weights
            )

        signatures = [signature(segment) for segment in segments]
        return [bool(s) and signatures.count(s) > 1 for s in signatures]

    def describe(self):
        if not self.places:
            return (
                "Candidate places: none. A place needs a tensor of shape (batch, "
                "tokens, channels), with known tokens and channels, that everything "
                "after it depends on, before a block that mixes tokens."
            )
        return "Candidate places: " + "; ".join(str(place) for place in self.places)

    def find(self, location):
        count = self.num_blocks
        if not self.places:
            raise ValueError(
                "Argument `model` has no place for a TokenLearner. " + self.describe()
            )
        if isinstance(location, str):
            for place in self.places:
                if place.layer == location:
                    return place
            expected = "the name of a layer before which tokens can be replaced"
        elif isinstance(location, bool) or not isinstance(location, (int, float)):
            expected = "a float, an int or the name of a layer"
        elif isinstance(location, int):
            if 0 <= location < count:
                return self.places[location]
            expected = f"the index of a block, from 0 to {count - 1}"
        else:
            if 0 <= location < 1:
                return self.places[math.floor(location * count)]
            expected = "a float in [0, 1)"
        raise ValueError(
            f"Argument `location` must be {expected}. "
            f"Received: location={location!r}. {self.describe()}"
        )


def _make_token_learner(token_learner, num_tokens, grid_shape, name, arguments):
    if token_learner is not None and not callable(token_learner):
        if token_learner not in VARIANTS:
            raise ValueError(
                f"Invalid value for argument `token_learner`. Expected one of "
                f"{VARIANTS}, a function from `num_tokens` to a layer, or None. "
                f"Received: token_learner={token_learner!r}"
            )
        token_learner = getattr(TokenLearner, token_learner)
    elif token_learner is None:
        token_learner = TokenLearner
    if token_learner is TokenLearner or getattr(token_learner, "__self__", None) is (
        TokenLearner
    ):
        # A video's grid is a reshape before the layer.
        grid = grid_shape if len(grid_shape) == 2 else None
        return token_learner(
            num_tokens, **{"grid_shape": grid, "name": name, **arguments}
        )
    layer = token_learner(num_tokens, **arguments)
    if not isinstance(layer, keras.layers.Layer):
        raise ValueError(
            "Argument `token_learner` must return a Keras layer. "
            f"Received: {layer!r} from token_learner({num_tokens})"
        )
    layer.name = name
    return layer


def _token_layout(program, chain, prefix, suffix, grid_shape):
    """Numbers of special tokens before and after the patches, and the patches' grid."""
    num_tokens = program.specs[chain.first][0][1]
    if grid_shape is not None:
        if len(grid_shape) == 3:
            check_positive_int("grid_shape[0]", grid_shape[0])
            grid_shape = (grid_shape[0], *check_grid_shape(grid_shape[1:]))
        else:
            grid_shape = check_grid_shape(grid_shape)
    for argument, value in (
        ("num_prefix_tokens", prefix),
        ("num_suffix_tokens", suffix),
    ):
        if value is not None and (not isinstance(value, int) or value < 0):
            raise ValueError(
                f"Argument `{argument}` must be an integer of at least 0, or None. "
                f"Received: {argument}={value!r}"
            )
    if None in (prefix, suffix, grid_shape):
        probe = _Probe(program, chain.first)
        if prefix is None or suffix is None:
            found = probe.special_tokens()
            if found is None and grid_shape is not None:
                rest = num_tokens - math.prod(grid_shape)
                found = (rest - (suffix or 0), suffix or 0)
            elif found is None:
                found = (0, 0) if probe.image_shape is None else None
            if found is None:
                raise ValueError(
                    "Cannot tell which tokens of the model are patches: pass "
                    "`num_prefix_tokens` (class and register tokens) and `grid_shape`. "
                    f"Received: num_prefix_tokens={prefix}, grid_shape={grid_shape} "
                    f"for {num_tokens} tokens"
                )
            prefix = found[0] if prefix is None else prefix
            suffix = found[1] if suffix is None else suffix
        if grid_shape is None:
            grid_shape = probe.grid(num_tokens - prefix - suffix, prefix)
        if grid_shape is None:
            raise ValueError(
                "Cannot tell the grid of the patches: pass `grid_shape=(height, "
                "width)`, or `(time, height, width)` for a video. Received: "
                f"grid_shape=None for {num_tokens - prefix - suffix} patch tokens"
            )
    if prefix + suffix + math.prod(grid_shape) != num_tokens:
        raise ValueError(
            "`num_prefix_tokens`, `num_suffix_tokens` and the product of `grid_shape` "
            f"must add up to the number of tokens, {num_tokens}. Received: "
            f"num_prefix_tokens={prefix}, num_suffix_tokens={suffix}, "
            f"grid_shape={grid_shape}"
        )
    return prefix, suffix, grid_shape


class _Probe:
    """Finds special tokens and the grid by what the tokens at `key` depend on."""

    def __init__(self, program, key):
        self.program, self.key = program, key
        shape, dtype = program.specs[program.inputs[0]]
        self.dtype = dtype
        self.shape = shape[1:]
        is_image = len(shape) in (4, 5) and None not in shape[1:]
        self.image_shape = self.shape if is_image and len(program.inputs) == 1 else None
        self.channels_last = not (
            is_image
            and len(shape) == 4
            and shape[1] in (1, 3)
            and shape[3] not in (1, 3)
        )

    def _noise(self, seed):
        rng = np.random.default_rng(seed)
        if "int" in self.dtype:
            return rng.integers(0, 256, self.shape).astype(self.dtype)
        return rng.uniform(-1, 1, self.shape).astype("float32")

    def _tokens(self, inputs):
        """The tokens, `(len(inputs), tokens, channels)`, or `None` if it cannot run."""
        program = self.program
        if len(program.inputs) != 1 or None in self.shape:
            return None
        values = {
            program.inputs[0]: ops.convert_to_tensor(np.stack(inputs), dtype=self.dtype)
        }
        try:
            for step in program.steps:
                if self.key in values:
                    break
                values.update(zip(step.outputs, step.call(step.op, values)))
            return np.asarray(
                ops.convert_to_numpy(ops.cast(values[self.key], "float32"))
            )
        except Exception:  # a layer that this device cannot run
            return None

    def _changed(self, change):
        """Which tokens change when `change` is applied to an input."""
        image = self._noise(0)
        other = change(image.copy())
        tokens = self._tokens([image, other])
        return None if tokens is None else np.any(tokens[0] != tokens[1], axis=-1)

    def special_tokens(self):
        """Numbers of tokens before and after those that depend on the input."""
        changed = self._changed(lambda image: self._noise(1))
        if changed is None or not changed.any():
            return None
        (places,) = np.nonzero(changed)
        if len(places) != places[-1] - places[0] + 1:
            return None
        return int(places[0]), int(len(changed) - 1 - places[-1])

    def grid(self, num_patches, prefix):
        """The patches' grid, row by row, or `None`."""
        if self.image_shape is None:
            side = math.isqrt(num_patches)
            is_flat = len(self.shape) == 2 and side * side == num_patches
            return (side, side) if is_flat else None
        top, left = (-3, -2) if self.channels_last else (-2, -1)

        def edge(axis):
            def change(image):
                moved = np.moveaxis(image, axis, 0)
                moved[0] = np.moveaxis(self._noise(1), axis, 0)[0]
                return image

            return change

        counts = []
        for axis in (top, left):
            changed = self._changed(edge(axis))
            if changed is None:
                return self._grid_of_aspect(num_patches)
            patches = changed[prefix : prefix + num_patches].astype(int)
            if patches.all() or not patches.any():
                # One row or column, or a first layer that sees the whole image.
                counts.append(None)
            else:
                counts.append(int(np.sum(np.diff(patches, prepend=0) == 1)))
        rows_changed, runs = counts
        if None in counts:
            return self._grid_of_aspect(num_patches)
        frames = rows_changed if len(self.image_shape) == 4 else 1
        height, width = runs // frames, num_patches // runs
        if frames * height * width != num_patches:
            return self._grid_of_aspect(num_patches)
        return (
            (frames, height, width) if len(self.image_shape) == 4 else (height, width)
        )

    def _grid_of_aspect(self, num_patches):
        """The grid with the image's aspect ratio, if there is one."""
        if len(self.image_shape) != 3:
            return None
        height, width = (
            self.image_shape[:2] if self.channels_last else self.image_shape[1:]
        )
        rows = math.isqrt(num_patches * height // width)
        if rows and num_patches % rows == 0:
            columns = num_patches // rows
            if rows * width == columns * height:
                return rows, columns
        return None


def _reassembled(step, tokens, producers):
    """The key of the tensor that a Concatenate puts together again, or `None`.

    `step` concatenates the class tokens of a tensor with the tokens learned from its
    patches: without the TokenLearner that is the tensor itself.
    """
    if not isinstance(step.op, keras.layers.Concatenate):
        return None
    sources, kept = set(), 0
    for key in step.inputs:
        producer = producers.get(key)
        if key == tokens:
            source = producers[tokens].inputs[0]
            producer = producers.get(source)
            while producer is not None and isinstance(
                producer.op, keras.layers.Reshape
            ):
                producer = producers.get(producer.inputs[0])
        if producer is None or not isinstance(producer.op, keras.layers.Cropping1D):
            return None
        sources.add(producer.inputs[0])
        kept += 1
    return sources.pop() if len(sources) == 1 and kept > 1 else None


class _Builder:
    """Builds a functional model by running a program on symbolic tensors."""

    def __init__(self, model, program, share_weights):
        self.model, self.program = model, program
        self.share_weights = share_weights
        self.operations = {}  # id of an operation: the one in the new model
        self.copies = {}  # id of a layer: its copy, still without its weights
        self.names = {step.op.name for step in program.steps}
        self.names |= {tensor.name for tensor in model.inputs}
        self.taken = set()

    def reserve(self, name):
        """`name`, or the first free `name_1`, `name_2`..."""
        for suffix in itertools.chain([""], (f"_{i}" for i in itertools.count(1))):
            if name + suffix not in self.names:
                self.names.add(name + suffix)
                return name + suffix

    def operation(self, step):
        op = step.op
        if id(op) in self.operations:
            return self.operations[id(op)]
        # Two nested models may hold layers of one name.
        name = op.name if op.name not in self.taken else self.reserve(op.name)
        self.taken.add(name)
        is_layer = isinstance(op, keras.layers.Layer)
        if not is_layer:
            new = op if name == op.name else _rebuild(op, name)
        elif self.share_weights:
            # An adapter where a saved model could not be loaded, or the name is taken.
            new = op
            if name != op.name or not _rebuilds(op) or step.returns_none:
                new = LayerAdapter(op, name=name)
        else:
            new = _rebuild(op, name, step.returns_none)
            self.copies[id(op)] = new
        self.operations[id(op)] = new
        return new

    def build(
        self, insertions, skip=frozenset(), aliases=None, identities=None, flatten=None
    ):
        program, aliases, identities = self.program, aliases or {}, identities or {}
        inputs = tree.map_structure(
            lambda x: keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name),
            self.model.input,
        )
        values = dict(zip(program.inputs, tree.flatten(inputs)))
        outputs = dict(values)
        inserted = False
        for key, insert in insertions.items():
            if key in values:
                values[key] = insert(values[key])
                inserted = True
        replaced = {**identities, **aliases}
        needed = set(program.outputs)
        for step in reversed(program.steps):
            if not needed & set(step.outputs):
                continue
            if id(step) in skip:
                needed |= {replaced[key] for key in step.outputs}
            else:
                needed |= set(step.inputs)
        for step in program.steps:
            if not needed & set(step.outputs):
                continue
            if id(step) in skip:
                for key in step.outputs:
                    if key in aliases:
                        values[key] = values[aliases[key]]
                    else:
                        values[key] = flatten(values[identities[key]])
                    outputs[key] = values[key]
                continue
            operation = self.operation(step)
            try:
                results = step.call(operation, values)
                copy = self.copies.pop(id(step.op), None)
                if copy is not None:
                    _copy_state(step.op, copy)
            except Exception as error:
                if not inserted:
                    raise
                raise _CannotBuild(
                    f"layer '{step.op.name}' after it does not take another number "
                    f"of tokens ({type(error).__name__}: {error})."
                ) from error
            for key, result in zip(step.outputs, results):
                values[key] = outputs[key] = result
                if key in insertions:
                    values[key] = insertions[key](result)
                    inserted = True
        new_outputs = tree.pack_sequence_as(
            self.model.output, [outputs[key] for key in program.outputs]
        )
        return keras.Model(inputs, new_outputs, name=self.model.name)


def _repaired_config(op):
    """A config that the constructor takes, from `get_config` and the attributes."""
    try:
        config = op.get_config()
    except Exception:
        config = {"name": op.name, "trainable": op.trainable}
        config["dtype"] = keras.dtype_policies.serialize(op.dtype_policy)
    parameters = inspect.signature(type(op).__init__).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    base = {"name", "trainable", "dtype"} if takes_any else set()
    repaired = {k: v for k, v in config.items() if k in parameters or k in base}
    for name in parameters:
        value = getattr(op, name, None)
        if (
            name not in repaired
            and name != "self"
            and isinstance(value, (bool, int, float, str, tuple, list))
        ):
            repaired[name] = value
    return repaired


def _rebuilds(op):
    """Whether an operation's own config makes an equal one."""
    try:
        config = op.get_config()
        type(op).from_config(config)
    except Exception:
        return False
    # A constructor argument that the config leaves out would be lost.
    parameters = inspect.signature(type(op).__init__).parameters
    if type(op).__module__.startswith(("keras.", "tokenlearner_keras.")):
        return True
    return all(
        name in config or p.default == getattr(op, name, p.default)
        for name, p in parameters.items()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name != "self"
    )


def _rebuild(op, name, needs_adapter=False):
    """A new operation equal to `op`, without its weights' values."""
    try:
        if _rebuilds(op) and not needs_adapter:
            return type(op).from_config({**op.get_config(), "name": name})
        inner = type(op).from_config(_repaired_config(op))
    except Exception as error:
        raise _CannotBuild(
            f"layer '{op.name}' cannot be copied from its config "
            f"({type(error).__name__}: {error}). `share_weights=True` needs no copy."
        ) from error
    return LayerAdapter(inner, name=name)


def _copy_state(old, new):
    if isinstance(new, LayerAdapter) and not isinstance(old, LayerAdapter):
        new = new.layer
    if [tuple(w.shape) for w in old.weights] != [tuple(w.shape) for w in new.weights]:
        raise ValueError(
            f"the copy of layer '{old.name}' has weights of other shapes: "
            f"{[tuple(w.shape) for w in new.weights]} for "
            f"{[tuple(w.shape) for w in old.weights]}"
        )
    for a, b in zip(old._flatten_layers(), new._flatten_layers()):
        b.trainable = a.trainable
    for a, b in zip(old.weights, new.weights):
        # Through an array of its own: JAX would let both share one buffer, which the
        # training of either gives away.
        b.assign(np.array(ops.convert_to_numpy(a)))


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class LayerAdapter(keras.layers.Layer):
    """Holds a layer of another package that could not be saved by itself.

    Some packages have layers that are only ever rebuilt by the model around them:
    their config has entries that their constructor refuses. A model that is made of
    such layers is saved with one adapter around each. Outputs that are `None` are
    dropped.

    Args:
        layer: The layer, whose class can be imported.
        **kwargs: Base layer arguments, such as `name` and `dtype`.

    Call arguments:
        inputs: The input of the layer.

    Output:
        The tensors that the layer returns.
    """

    def __init__(self, layer, **kwargs):
        kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(**kwargs)
        self.layer = layer
        # The layer casts its own input, as it would without the adapter.
        self.autocast = False

    def build(self, input_shape):
        if not self.layer.built:
            self.layer.build(input_shape)
            self.layer.built = True

    def call(self, inputs, *args, **kwargs):
        return self._tensors(self.layer(inputs, *args, **kwargs))

    def compute_output_spec(self, inputs, *args, **kwargs):
        return self._tensors(self.layer.compute_output_spec(inputs, *args, **kwargs))

    def _tensors(self, outputs):
        tensors = [x for x in tree.flatten(outputs) if x is not None]
        return tensors[0] if len(tensors) == 1 else tensors

    def get_config(self):
        config = super().get_config()
        layer = keras.saving.serialize_keras_object(self.layer)
        layer["config"] = keras.saving.serialize_keras_object(
            _repaired_config(self.layer)
        )
        config["layer"] = layer
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        if isinstance(config["layer"], dict):
            config["layer"] = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**config)
