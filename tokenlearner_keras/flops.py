"""Counts the operations of a Keras model from the graph that the model traces to."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import keras

from tokenlearner_keras.layers._checks import check_choice
from tokenlearner_keras.layers._forms import literal_definitions
from tokenlearner_keras.ops import force_vector_attention_method

CONVENTIONS = ("macs", "tf_profiler", "xla")
UNITS = {"macs": "MACs", "tf_profiler": "FLOPs", "xla": "FLOPs/2"}
OUTSIDE = "(outside layers)"

# Operations that move, name or create data: no convention counts them.
_MOVEMENT = frozenset(
    """
    Placeholder PlaceholderWithDefault Const Identity IdentityN Reshape Transpose
    Squeeze ExpandDims Concat ConcatV2 Slice StridedSlice Gather GatherV2 GatherNd Pack
    Unpack Split SplitV Tile BroadcastTo BroadcastArgs Pad PadV2 MirrorPad
    ReadVariableOp VarHandleOp ResourceGather Shape ShapeN Size Rank Fill ZerosLike
    OnesLike Range StopGradient PreventGradient NoOp Assert CheckNumerics OneHot
    ReverseV2 ReverseSequence Roll SpaceToBatchND BatchToSpaceND SpaceToDepth
    DepthToSpace ExtractImagePatches ExtractVolumePatches InvertPermutation Bitcast
    MatrixDiagV3 MatrixDiagPartV3 MatrixBandPart MatrixSetDiagV3 ScatterNd
    TensorScatterUpdate BroadcastGradientArgs Empty EmptyTensorList TensorListReserve
    TensorListFromTensor TensorListStack TensorListGetItem TensorListSetItem
    TensorListPushBack TensorListPopBack TensorListElementShape TensorListLength
    XlaDynamicSlice XlaDynamicUpdateSlice Where DynamicStitch EnsureShape Snapshot
    _Arg _Retval AssignVariableOp Print PrintV2 StringFormat Unique Diag DiagPart
    """.split()  # noqa: SIM905
)

# Flops of one output element: (as TensorFlow's registry counts, as XLA counts). XLA
# counts exp, tanh, sqrt and their like as transcendentals, apart from flops.
_ELEMENTWISE = {
    **dict.fromkeys(
        [
            "Add",
            "AddV2",
            "Sub",
            "Mul",
            "RealDiv",
            "Maximum",
            "Minimum",
            "Greater",
            "GreaterEqual",
            "Less",
            "LessEqual",
            "Equal",
            "NotEqual",
            "Neg",
            "Reciprocal",
            "BiasAdd",
            "Square",
        ],
        (1, 1),
    ),
    **dict.fromkeys(
        [
            "Abs",
            "Sign",
            "Floor",
            "Ceil",
            "Round",
            "Rint",
            "Cast",
            "Select",
            "SelectV2",
            "LogicalAnd",
            "LogicalOr",
            "LogicalNot",
            "LogicalXor",
            "Relu",
            "Relu6",
            "Div",
            "FloorDiv",
            "FloorMod",
            "Mod",
            "TruncateMod",
            "TruncateDiv",
            "BitwiseAnd",
            "BitwiseOr",
            "BitwiseXor",
            "Invert",
            "IsFinite",
            "IsNan",
            "IsInf",
            "LeftShift",
            "RightShift",
        ],
        (0, 1),
    ),
    **dict.fromkeys(
        [
            "Exp",
            "Expm1",
            "Log1p",
            "Tanh",
            "Sigmoid",
            "Sqrt",
            "Erf",
            "Erfc",
            "Sin",
            "Cos",
            "Tan",
            "Atan",
            "Atan2",
            "Asin",
            "Acos",
            "Sinh",
            "Cosh",
            "Asinh",
            "Acosh",
            "Atanh",
        ],
        (0, 0),
    ),
    "SquaredDifference": (2, 2),
    "Rsqrt": (2, 0),
    "Log": (1, 0),
    "DivNoNan": (0, 3),
    "MulNoNan": (0, 3),
    "Xdivy": (0, 3),
    "Xlogy": (0, 3),
    "ClipByValue": (0, 2),
    "LeakyRelu": (0, 3),
    "Elu": (0, 2),
    "Selu": (0, 4),
    "Softplus": (0, 6),
    "Softsign": (0, 3),
    "Softmax": (5, 4),
    "LogSoftmax": (0, 4),
    "L2Loss": (3, 3),
    "ArgMax": (1, 3),
    "ArgMin": (1, 3),
    "Cumsum": (0, 1),
    "Cumprod": (0, 1),
}
# Reductions: an operation for each input that is folded into an output.
_REDUCTIONS = frozenset(
    ["Sum", "Mean", "Max", "Min", "Prod", "All", "Any", "EuclideanNorm"]
)
_TF_REDUCTIONS = frozenset(("Sum", "Mean"))
_POOLINGS = frozenset(["AvgPool", "MaxPool", "AvgPool3D", "MaxPool3D"])
_MATMULS = frozenset(["MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"])
_CONVOLUTIONS = frozenset(["Conv2D", "Conv3D", "DepthwiseConv2dNative"])
_TRANSPOSED = frozenset(("Conv2DBackpropInput", "Conv3DBackpropInputV2"))
_CALLS = frozenset(["PartitionedCall", "StatefulPartitionedCall"])
_BRANCHES = frozenset(["If", "StatelessIf", "Case", "StatelessCase"])
_LOOPS = frozenset(["While", "StatelessWhile"])


@dataclasses.dataclass(frozen=True)
class FlopsReport:
    """What `count_flops` found, for one example.

    Attributes:
        convention: str. The convention, as it was passed.
        total: int or float. The count of the whole model.
        by_layer: dict from the names of the model's layers, in the order in which they
            run, to their counts. They sum to `total`. What belongs to no layer stands
            under `"(outside layers)"`.
        by_sublayer: dict from paths such as `"block_0/attention/query"` to the counts
            of what runs in that layer and in none of its sublayers. They sum to
            `total` as well.
        uncounted: dict from the types of operations that may compute something, but
            that no rule knows, to how many there are. Empty when the count is whole.
    """

    convention: str
    total: float
    by_layer: Mapping[str, float]
    by_sublayer: Mapping[str, float]
    uncounted: Mapping[str, int]


def count_flops(
    model: keras.Model,
    convention: str = "macs",
    input_shape: Sequence | None = None,
) -> FlopsReport:
    """Counts the operations of one forward pass of a model, for one example.

    The model is traced, not run, with a batch of one and `training=False`, and the
    operations of its graph are counted: those of custom layers too, whatever they are
    made of. TensorFlow backend only.

    - `"macs"`: multiply-adds of matrix products and convolutions, and nothing else.
      Kernel taps that fall on padding are not counted. This is how many papers count
      "FLOPs".
    - `"tf_profiler"`: as TensorFlow's profiler. Two for a multiply-add, padding taps
      included; a softmax five an element; additions, multiplications, sums and means
      one. What its registry lacks (sigmoid, relu, exp) is zero, but for matrix products
      written as `einsum`, which count as matrix products. Tables 4 and 5 of
      [TokenLearner](https://arxiv.org/abs/2106.11297v1) count so.
    - `"xla"`: half the flops of XLA's cost analysis: one for a multiply-add, one half
      for any other arithmetic operation on an element, nothing for transcendental
      functions (exp, tanh, erf, sqrt) and padding taps. Table 1 counts so.

    A `VectorAttention` with `method="auto"` is counted as its definition (equation 2),
    as the paper counts it: what it runs depends on the data. With any other method it
    is counted as it runs. A `TokenLearner` with `value_dim` maps every position first,
    and a depthwise convolution over time is one, although both run in a form that needs
    fewer or faster operations. Of the branches of a conditional the costliest counts; a
    loop counts as often as it runs where that can be read off the graph, else it is
    counted once and listed in `uncounted`.

    Args:
        model: Keras model with known inputs, functional for instance.
        convention: `"macs"`, `"tf_profiler"` or `"xla"`.
        input_shape: Shape of the input without the batch axis, or a list of shapes for
            a model of several inputs. Needed where the model leaves a size open.

    Returns:
        A `FlopsReport` with `total`, `by_layer`, `by_sublayer` and `uncounted`.

    Raises:
        ValueError: for an unknown convention, a model without known inputs, an input
            size that is not known, or a backend other than TensorFlow.

    Example:

    >>> model = keras.Sequential([keras.Input((32,)), keras.layers.Dense(10)])
    >>> count_flops(model).total
    320
    """
    check_choice("convention", convention, CONVENTIONS)
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "count_flops needs the TensorFlow backend (set KERAS_BACKEND=tensorflow). "
            f"Received: backend={keras.backend.backend()!r}"
        )
    graph, paths = _trace(model, input_shape)
    counter = _Counter(convention, paths)
    counter.add_graph(graph, (), 1)
    by_sublayer = {
        "/".join(path) or OUTSIDE: _number(count, convention)
        for path, count in counter.counts.items()
    }
    by_layer = dict.fromkeys(
        operation.name
        for operation in getattr(model, "operations", model.layers)
        if not isinstance(operation, keras.layers.InputLayer)
    )
    by_layer = {name: 0 for name in by_layer}
    for path, count in counter.counts.items():
        name = path[0] if path else OUTSIDE
        by_layer[name] = by_layer.get(name, 0) + count
    return FlopsReport(
        convention=convention,
        total=_number(sum(counter.counts.values()), convention),
        by_layer={k: _number(v, convention) for k, v in by_layer.items()},
        by_sublayer=by_sublayer,
        uncounted=counter.uncounted,
    )


def print_flops(
    model: keras.Model,
    convention: str = "macs",
    input_shape: Sequence | None = None,
    sublayers: bool = False,
    print_fn=print,
) -> FlopsReport:
    """Prints a table of a model's layers with their weights and operations.

    Args:
        model: Keras model, as for `count_flops`.
        convention: `"macs"`, `"tf_profiler"` or `"xla"`, see `count_flops`.
        input_shape: As for `count_flops`.
        sublayers: bool. Whether every sublayer has a line of its own.
        print_fn: Function that is called with each line.

    Returns:
        The `FlopsReport` that was printed.
    """
    report = count_flops(model, convention, input_shape)
    unit = UNITS[convention]
    counts = report.by_sublayer if sublayers else report.by_layer
    weights = {
        operation.name: getattr(operation, "count_params", lambda: 0)()
        for operation in getattr(model, "operations", model.layers)
    }
    rows = [("layer", "" if sublayers else "parameters", unit, "share")]
    for name, count in counts.items():
        share = count / report.total if report.total else 0.0
        params = "" if sublayers else f"{weights.get(name, 0):,}"
        rows.append((name, params, _readable(count), f"{share:7.2%}"))
    rows.append(("total", f"{model.count_params():,}", _readable(report.total), ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    rule = "-" * (sum(widths) + 6)
    shape = f" {tuple(input_shape)}" if input_shape is not None else ""
    print_fn(f"{model.name}{shape}: {unit} of one example (convention: {convention})")
    for index, row in enumerate(rows):
        if index in (1, len(rows) - 1):
            print_fn(rule)
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print_fn("  ".join(cells).rstrip())
    if report.uncounted:
        listed = ", ".join(f"{k} (x{v})" for k, v in report.uncounted.items())
        print_fn(f"Not counted, because no rule knows them: {listed}")
    return report


def _number(count, convention):
    return count / 2 if convention == "xla" else int(count)


def _readable(count):
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:,.3f} {letter}"
    return f"{count:,.0f}  "


def _input_specs(model, input_shape):
    """Returns the tensor specifications of one example, in the model's structure."""
    import tensorflow as tf

    inputs = getattr(model, "inputs", None)
    if not inputs:
        raise ValueError(
            "Argument `model` must be a Keras model with known inputs, such as a "
            f"functional one. Received: model={model!r}"
        )
    shapes = [tuple(tensor.shape[1:]) for tensor in inputs]
    if input_shape is not None:
        first = input_shape[0] if len(input_shape) else None
        single = first is None or isinstance(first, int)
        given = [tuple(s) for s in ([input_shape] if single else input_shape)]
        fits = len(given) == len(shapes) and all(
            len(g) == len(s)
            and all(b is None or a == b for a, b in zip(g, s, strict=True))
            for g, s in zip(given, shapes, strict=True)
        )
        if not fits:
            raise ValueError(
                "Argument `input_shape` must fit the inputs of the model, of shapes "
                f"{shapes} (without the batch axis). Received: "
                f"input_shape={input_shape}"
            )
        shapes = given
    for tensor, shape in zip(inputs, shapes, strict=True):
        if None in shape:
            raise ValueError(
                f"The size of the model's input '{tensor.name}' is not known: pass "
                f"`input_shape`. Received: shape {shape} (without the batch axis)"
            )
    specs = [
        tf.TensorSpec((1, *shape), tensor.dtype)
        for tensor, shape in zip(inputs, shapes, strict=True)
    ]
    structure = getattr(model, "_inputs_struct", None)
    if structure is None:  # `Sequential` has one input.
        return specs[0]
    return keras.tree.pack_sequence_as(structure, specs)


def _trace(model, input_shape):
    """Returns the graph of the model, and the layer of each marker in its names."""
    import tensorflow as tf

    specs = _input_specs(model, input_shape)
    names = []
    with contextlib.ExitStack() as stack:
        for layer in _all_operations(model):
            _mark_calls(layer, names, stack)
        stack.enter_context(force_vector_attention_method("dense"))
        stack.enter_context(literal_definitions())
        function = tf.function(
            lambda inputs: model(inputs, training=False), autograph=False
        )
        graph = function.get_concrete_function(specs).graph
    return graph, names


def _all_operations(model):
    """The layers and operations inside the model, each once, at every depth."""
    found = {}
    pending = list(getattr(model, "operations", model.layers))
    while pending:
        operation = pending.pop()
        if id(operation) in found or operation is model:
            continue
        found[id(operation)] = operation
        if isinstance(operation, keras.Layer):
            pending.extend(operation._flatten_layers(include_self=False))
        pending.extend(getattr(operation, "operations", ()))
    return found.values()


def _mark_calls(layer, names, stack):
    """Makes `layer.call` run inside a name scope that leads back to the layer.

    Names alone do not: TensorFlow renames a scope that is entered twice, to a name that
    another layer may have.
    """
    import tensorflow as tf

    marker = f"tlk.{len(names)}."
    names.append(layer.name)
    call = layer.call

    def marked_call(*args, **kwargs):
        with tf.name_scope(marker):
            return call(*args, **kwargs)

    # Past Keras's attribute tracking; on the instance, so that deleting it restores
    # the method.
    object.__setattr__(layer, "call", marked_call)
    stack.callback(object.__delattr__, layer, "call")


class _Counter:
    """Adds up the operations of a graph, in units of flops (`"macs"`: of MACs)."""

    _MARKER = re.compile(r"tlk\.(\d+)\.")

    def __init__(self, convention, names):
        self.convention = convention
        self.names = names
        self.counts = {}
        self.uncounted = {}

    def add_graph(self, graph, path, times):
        for op in _live_operations(graph):
            self._add_operation(op, path, times)

    def _add_operation(self, op, path, times):
        markers = self._MARKER.findall(op.name)
        path = path + tuple(self.names[int(marker)] for marker in markers)
        if op.type in _CALLS:
            self.add_graph(_function(op, op.get_attr("f")), path, times)
            return
        if op.type in _BRANCHES:
            self._add_costliest_branch(op, path, times)
            return
        if op.type in _LOOPS:
            trips = _trip_count(op)
            if trips is None:
                self._not_counted(f"{op.type} (unknown trip count, counted once)")
                trips = 1
            self.add_graph(_function(op, op.get_attr("body")), path, times * trips)
            return
        if op.type in _MOVEMENT or not op.outputs:
            return
        try:
            count = self._count(op)
        except _UnknownShapeError:
            self._not_counted(f"{op.type} (unknown shape)")
            return
        if count is None:
            self._not_counted(op.type)
        elif count:
            self.counts[path] = self.counts.get(path, 0) + count * times

    def _add_costliest_branch(self, op, path, times):
        if op.type in ("If", "StatelessIf"):
            branches = [op.get_attr("then_branch"), op.get_attr("else_branch")]
        else:
            branches = op.get_attr("branches")
        results = []
        for branch in branches:
            counter = _Counter(self.convention, self.names)
            counter.add_graph(_function(op, branch), path, times)
            results.append(counter)
        best = max(results, key=lambda counter: sum(counter.counts.values()))
        for key, count in best.counts.items():
            self.counts[key] = self.counts.get(key, 0) + count
        for key, count in best.uncounted.items():
            self.uncounted[key] = self.uncounted.get(key, 0) + count

    def _not_counted(self, name):
        self.uncounted[name] = self.uncounted.get(name, 0) + 1

    def _count(self, op):
        """The count of one operation; `None` if no rule knows it."""
        macs, products = _multiply_adds(op, self.convention == "tf_profiler")
        if macs is not None:
            return macs if self.convention == "macs" else 2 * macs
        if products is not None:
            return 0 if self.convention == "macs" else products
        arithmetic = _arithmetic(op)
        if arithmetic is None:
            return None
        return {
            "macs": 0,
            "tf_profiler": arithmetic[0],
            "xla": arithmetic[1],
        }[self.convention]


class _UnknownShapeError(Exception):
    pass


def _live_operations(graph):
    """The operations that the outputs of the graph need, in the order of creation."""
    live = set()
    pending = [tensor.op for tensor in graph.outputs]
    while pending:
        op = pending.pop()
        if op in live:
            continue
        live.add(op)
        pending.extend(tensor.op for tensor in op.inputs)
        pending.extend(op.control_inputs)
    return [op for op in graph.get_operations() if op in live]


def _function(op, attribute):
    return op.graph._get_function(attribute.name).graph


def _shape(tensor):
    if tensor.shape.rank is None or not tensor.shape.is_fully_defined():
        raise _UnknownShapeError
    return tensor.shape.as_list()


def _size(tensor):
    return math.prod(_shape(tensor))


def _multiply_adds(op, padding_counts):
    """Returns (multiply-adds, `None`), or (`None`, products) if nothing is summed."""
    if op.type in _MATMULS:
        # Either transpose flag: MatMul has `transpose_a`, BatchMatMul has `adj_x`.
        name = "transpose_a" if op.type == "MatMul" else "adj_x"
        inner = _shape(op.inputs[0])[-2 if op.get_attr(name) else -1]
        return _size(op.outputs[0]) * inner, None
    if op.type in ("Einsum", "XlaEinsum"):
        return _einsum(op)
    if op.type in _CONVOLUTIONS:
        return _convolution(op, op.inputs[0], op.outputs[0], padding_counts), None
    if op.type in _TRANSPOSED:
        # A transposed convolution joins the same pairs as the convolution whose
        # gradient it is: input and output change places.
        count = _convolution(op, op.outputs[0], op.inputs[2], padding_counts)
        return count, None
    return None, None


def _einsum(op):
    equation = op.get_attr("equation").decode()
    terms, output = equation.replace(" ", "").split("->")
    terms = terms.split(",")
    if len(terms) == 1:
        folded = _size(op.inputs[0]) - _size(op.outputs[0])
        return None, max(folded, 0)
    sizes = {}
    for term, tensor in [*zip(terms, op.inputs), (output, op.outputs[0])]:
        shape = _shape(tensor)
        before, dots, after = term.partition("...")
        if dots:
            middle = shape[len(before) : len(shape) - len(after)]
            for index, size in enumerate(reversed(middle)):
                key = ("...", index)
                sizes[key] = max(size, sizes.get(key, 1))
        labels = list(before) + list(after)
        ends = shape[: len(before)] + shape[len(shape) - len(after) :]
        sizes.update(zip(labels, ends, strict=True))
    points = math.prod(sizes.values())
    letters = set("".join(terms).replace(".", ""))
    if letters <= set(output):
        return None, points
    return points, None


def _convolution(op, image, result, padding_counts):
    """Multiply-adds of the convolution from `image` to `result`."""
    layout = op.get_attr("data_format").decode()
    axes = [layout.index(axis) for axis in "DHW" if axis in layout]
    image_shape, result_shape = _shape(image), _shape(result)
    kernel = _shape(op.inputs[1])
    strides = op.get_attr("strides")
    dilations = op.get_attr("dilations")
    padding = op.get_attr("padding").decode()
    explicit = op.get_attr("explicit_paddings") if padding == "EXPLICIT" else None
    taps = 1
    for index, axis in enumerate(axes):
        size, steps, width = image_shape[axis], result_shape[axis], kernel[index]
        if padding_counts:
            taps *= steps * width
            continue
        stride, dilation = strides[axis], dilations[axis]
        reach = (steps - 1) * stride + (width - 1) * dilation + 1
        before = max(reach - size, 0) // 2 if padding == "SAME" else 0
        if explicit is not None:
            before = explicit[2 * axis]
        taps *= _taps(size, steps, width, stride, dilation, before)
    count = result_shape[0] * taps
    if not padding_counts:
        count = _dilated_taps(op) or count
    # The input channels (of one group) and the output channels; of a depthwise kernel
    # the channels and their multiplier.
    return count * kernel[-2] * kernel[-1]


def _taps(size, steps, width, stride, dilation, before):
    """How many kernel taps fall on the input, along one axis."""
    return sum(
        0 <= step * stride - before + tap * dilation < size
        for step in range(steps)
        for tap in range(width)
    )


def _dilated_taps(op):
    """Taps of a dilated convolution; `None` if it is none.

    TensorFlow writes it as a plain one between two rearrangements, which pad.
    """
    import tensorflow as tf

    before = op.inputs[0].op
    while before.type == "ExpandDims":
        before = before.inputs[0].op
    after = op
    while after.type in ("Squeeze", op.type) and len(after.outputs[0].consumers()) == 1:
        after = after.outputs[0].consumers()[0]
    if (before.type, after.type) != ("SpaceToBatchND", "BatchToSpaceND"):
        return None
    dilations, paddings = (tf.get_static_value(t) for t in before.inputs[1:])
    if dilations is None or paddings is None:
        return None
    rank = len(dilations)
    image_shape, result_shape = _shape(before.inputs[0]), _shape(after.outputs[0])
    widths = _shape(op.inputs[1])[:-2][-rank:]
    taps = result_shape[0]
    for axis in range(rank):
        taps *= _taps(
            image_shape[1 + axis],
            result_shape[1 + axis],
            widths[axis],
            1,
            int(dilations[axis]),
            int(paddings[axis][0]),
        )
    # The axes of a convolution that the rearrangement leaves alone are not dilated.
    return taps if rank == len(op.inputs[1].shape) - 2 or _is_1d(op) else None


def _is_1d(op):
    return op.inputs[0].op.type == "ExpandDims"


def _arithmetic(op):
    """Flops of an operation, (TensorFlow's registry, XLA's); `None` if unknown."""
    import tensorflow as tf

    if op.type in _REDUCTIONS:
        inputs, outputs = _size(op.inputs[0]), _size(op.outputs[0])
        count = inputs if op.type == "Mean" else inputs - outputs
        return count if op.type in _TF_REDUCTIONS else 0, count
    if op.type in _POOLINGS:
        window = math.prod(op.get_attr("ksize"))
        size = _size(op.outputs[0])
        return window * size, (window - op.type.startswith("Max")) * size
    if op.type == "Pow":
        size = _size(op.outputs[0])
        exponent = tf.get_static_value(op.inputs[1])
        # XLA writes small whole powers as products.
        if exponent is not None and exponent.size == 1 and exponent.item() in (2, 3):
            return size, size * (int(exponent.item()) - 1)
        return size, 0
    if op.type == "Mul":
        return _size(op.outputs[0]), _scaling(op) or _size(op.outputs[0])
    if op.type == "AddN":
        count = _size(op.outputs[0]) * (len(op.inputs) - 1)
        return count, count
    if op.type == "FusedBatchNormV3":
        # At inference, with the scale of each channel worked out beforehand.
        return 0, 2 * _size(op.outputs[0])
    if op.type == "L2Loss":
        size = _size(op.inputs[0])
        return 3 * size - 1, 2 * size
    if op.type in ("ArgMax", "ArgMin"):
        inputs, outputs = _size(op.inputs[0]), _size(op.outputs[0])
        return inputs - outputs, 3 * (inputs - outputs)
    if op.type in _ELEMENTWISE:
        size = _size(op.outputs[0])
        tf_flops, xla_flops = _ELEMENTWISE[op.type]
        return tf_flops * size, xla_flops * size
    return None


def _scaling(op):
    """XLA's flops of a product with a constant, if it scales a matrix product.

    XLA scales the smallest of the two factors and the result, whichever the model
    scales (attention logits, say, or the queries).
    """
    import tensorflow as tf

    for factor, other in (op.inputs, reversed(op.inputs)):
        product = other.op
        if product.type not in _MATMULS and product.type != "Einsum":
            continue
        if factor.shape.rank == 0 and tf.get_static_value(factor) is not None:
            return min(_size(tensor) for tensor in (*product.inputs, other))
    return None


def _trip_count(op):
    """How often a loop runs; `None` unless it counts up to a constant."""
    import tensorflow as tf

    condition = _function(op, op.get_attr("cond"))
    body = _function(op, op.get_attr("body"))
    positions = {tensor.op: index for index, tensor in enumerate(condition.inputs)}

    def constant(tensor):
        value = tf.get_static_value(tensor)
        if value is None and tensor.op in positions:
            index = positions[tensor.op]
            if _source(body.outputs[index]) is body.inputs[index].op:
                value = tf.get_static_value(op.inputs[index])
        return value

    trips = []
    for less in condition.get_operations():
        if less.type != "Less" or less.inputs[0].op not in positions:
            continue
        index = positions[less.inputs[0].op]
        start, end = tf.get_static_value(op.inputs[index]), constant(less.inputs[1])
        step = _source(body.outputs[index])
        if start is None or end is None or step.type not in ("AddV2", "Add"):
            continue
        if _source(step.inputs[0]) is not body.inputs[index].op:
            continue
        by = tf.get_static_value(step.inputs[1])
        if by is not None and by > 0:
            trips.append(max(0, math.ceil((int(end) - int(start)) / int(by))))
    return min(trips, default=None)


def _source(tensor):
    op = tensor.op
    while op.type == "Identity":
        op = op.inputs[0].op
    return op
