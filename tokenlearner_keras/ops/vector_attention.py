"""Vector attention (equation 2 of the paper) as a pure function."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from tokenlearner_keras.ops import _series, _streaming, _tiles, _wide
from tokenlearner_keras.ops._backend import stored, switch, unconverted, with_gradient

METHODS = ("auto", "dense", "streaming", "interpolated")
INTERPOLATED_TERMS = 40
# Enough for the same queries and keys within the spacing of bfloat16 at one.
BFLOAT16_TERMS = 30
# A sum over so few keys costs no more than a series.
FEW_KEYS = 40

_forced_method = contextvars.ContextVar("vector_attention_method", default=None)


@unconverted
def vector_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any = None,
    scale: float = 1.0,
    method: str = "auto",
    num_terms: int | None = None,
    dropout: float = 0.0,
    seed: Any = None,
) -> Any:
    """Attention with one softmax a channel (equation 2 of TokenLearner).

    `y[i, c] = sum_j w[i, j, c] value[j, c]`, where `w[i, :, c]` is the softmax over `j`
    of `scale * query[i, c] * key[j, c]`. In each channel the output is a function of
    one number, the query, so that it can be evaluated in linear time.

    Methods:

    - `"dense"`: the definition. Stores tensors of `queries * keys * channels`.
    - `"streaming"`: exact, in blocks. Quadratic time, linear memory.
    - `"interpolated"`: a power series of `num_terms` terms, in linear time and without
      branches. A channel where its error bound does not hold becomes NaN.
    - `"auto"`: the shortest compiled series whose error bound,
      `vector_attention_error_bound`, is at most the spacing of the dtype at one; where
      none is, where alternating terms would cancel, and for infinities, streaming. The
      choice is made for the whole batch while the program runs, by the GPU kernel of
      the JAX backend for a few channels of one example. Streaming as well for 40 keys
      or fewer, where a series would save nothing.

    Computed in float32 at least, whatever the dtype of the inputs.

    Args:
        query: Float tensor of shape `(batch, queries, channels)`.
        key: Float tensor of shape `(batch, keys, channels)`.
        value: Float tensor of shape `(batch, keys, channels)`.
        mask: Boolean tensor, true where a key may be attended to, or `None`. Of shape
            `(batch, keys)`, or `(batch, queries, keys)`; the latter takes the streaming
            form under `"auto"`. A query without any key gets zeros.
        scale: Factor of the logits.
        method: One of `"auto"`, `"dense"`, `"streaming"` and `"interpolated"`.
        num_terms: int or `None`. Length of the series of `"interpolated"`; `None` is
            40, enough for `max|query| * (max key - min key) / 2 <= 26`.
        dropout: float. Rate at which weights are dropped; the rest is scaled by
            `1 / (1 - dropout)`. Takes the streaming form under `"auto"`.
        seed: Integer tensor of two numbers, such as `keras.random.SeedGenerator.next`
            returns. Needed with `dropout`.

    Returns:
        Tensor of shape `(batch, queries, channels)` with the dtype of `value`.

    Raises:
        ValueError: for shapes that do not fit, an unknown method, or a mask or dropout
            that `"interpolated"` cannot take.

    Example:

    >>> x = keras.random.normal((2, 512, 432))
    >>> vector_attention(x, x, x).shape
    (2, 512, 432)
    """
    query, key, value = (ops.convert_to_tensor(x) for x in (query, key, value))
    _check_shapes(query, key, value, mask)
    method = resolve_method(method, mask, dropout)
    if num_terms is not None and method != "interpolated":
        raise ValueError(
            'Argument `num_terms` belongs to `method="interpolated"`. Received: '
            f"num_terms={num_terms!r} with method={method!r}"
        )
    dtype = keras.backend.standardize_dtype(value.dtype)
    # Not `result_type`, which makes float32 of float64 on PyTorch.
    inner = "float64" if dtype == "float64" else "float32"
    dtypes = [keras.backend.standardize_dtype(x.dtype) for x in (query, key, value)]
    query, key, value = (ops.cast(x, inner) for x in (query, key, value))
    if method == "auto" and key.shape[1] is not None and key.shape[1] <= FEW_KEYS:
        method = "streaming"
    if method == "dense":
        drop = _dense_dropout(query, key, dropout, seed)
        return ops.cast(dense(query, key, value, mask, scale, drop)[0], dtype)
    query = query * ops.cast(scale, inner)
    key_mask, pair_mask = ops.ones_like(key[:, :, :1]), None
    if mask is not None and len(mask.shape) == 3:
        pair_mask = ops.cast(ops.cast(mask, "bool"), inner)
        used = ops.any(ops.cast(mask, "bool"), axis=1)[:, :, None]
    elif mask is not None:
        used = ops.cast(mask, "bool")[:, :, None]
    if mask is not None:
        # What stands in masked positions, NaN too, must not reach any sum.
        key_mask = ops.cast(used, inner)
        key = ops.where(used, key, ops.zeros_like(key))
        value = ops.where(used, value, ops.zeros_like(value))
    tensors = [query, key, value, key_mask]
    if pair_mask is not None:
        tensors.append(pair_mask)
    if dropout > 0:
        tensors.append(ops.cast(ops.convert_to_tensor(seed), "int32"))
    function = _function(
        method, num_terms, inner, pair_mask is not None, dropout, mask is not None
    )
    exactness = "bfloat16" if set(dtypes) == {"bfloat16"} else inner
    fused = _fused_function(method, num_terms, exactness, function)
    if fused is not None and all(query.shape) and all(key.shape):
        function, tensors[3:] = fused, [] if mask is None else [key_mask]
        # The kernel reads half precision as it is. A scaled query would be rounded.
        for index, narrow in enumerate(dtypes):
            if narrow in ("bfloat16", "float16") and (index > 0 or scale == 1.0):
                tensors[index] = ops.cast(tensors[index], narrow)
    return ops.cast(function(*tensors), dtype)


def packed_attention(length, dtype, method="auto"):
    """Returns self-attention of queries, keys and values in one tensor, or `None`.

    Args:
        length: int or `None`. Number of tokens.
        dtype: Dtype of the tensor.
        method: As of `vector_attention`.

    Returns:
        Function of a tensor `(batch, tokens, 3 * channels)`, the queries first, which
        is what `vector_attention` is of the three. `None` where there is no kernel that
        takes them so.
    """
    method = resolve_method(method)
    if dtype == "float64" or length is None or length <= FEW_KEYS:
        return None
    plain = _function(method, None, "float32", False, 0.0, False)
    return _fused_function(method, None, dtype, plain, packed=True)


def vector_attention_error_bound(
    max_query: float, key_range: float, num_terms: int, dtype: str = "float32"
) -> float:
    """Bounds the truncation of the linear-time method, before anything is computed.

    The method replaces each weight `e^w`, where `w = query * (key - middle)` and
    `middle` is the middle of the range of the keys, by a polynomial of `w` with
    `num_terms` coefficients. For every query and key inside the given limits,

    `|polynomial(w) - e^w| <= bound * e^|w|`.

    So the output is off by at most `bound * K * max_j |value_j - output|` (to first
    order), where `K = sum_j e^|w_j| / sum_j e^w_j` is the cancellation of the query;
    `method="auto"` measures it and gives up above a root mean square of 16.

    Args:
        max_query: float. Largest `|scale * query|` of a channel.
        key_range: float. Largest minus smallest key of that channel.
        num_terms: int. Number of coefficients. 35, 40 and 64 have a near-minimax
            polynomial (in float32, `auto` uses 35 and 64, beyond 1024 tokens 40 as
            well, `interpolated` and the GPU kernel of the JAX backend 40), and 30 has
            one for bfloat16 (which that kernel uses where queries, keys and values are
            bfloat16); others are the Taylor series, as are all in float64.
        dtype: Name of the dtype of the queries, keys and values.

    Returns:
        The bound, a float; at least as large as the truth.

    Raises:
        ValueError: for a negative `max_query` or `key_range`, or `num_terms < 1`.

    Example:

    >>> vector_attention_error_bound(4.0, 8.0, num_terms=40) < 2**-23
    True
    """
    for name, number in (("max_query", max_query), ("key_range", key_range)):
        if not number >= 0:
            raise ValueError(
                f"Argument `{name}` must not be negative. Received: {name}={number!r}"
            )
    if not isinstance(num_terms, int) or num_terms < 1:
        raise ValueError(
            "Argument `num_terms` must be an integer of at least 1. "
            f"Received: num_terms={num_terms!r}"
        )
    z = float(max_query) * float(key_range) / 2
    return _series.remainder(num_terms, z, keras.backend.standardize_dtype(dtype))


@contextlib.contextmanager
def force_vector_attention_method(method: str) -> Iterator[None]:
    """Overrides `method="auto"` of every vector attention called or traced inside.

    A call that names another method keeps it. For tools that count or compare.

    Args:
        method: One of `"auto"`, `"dense"`, `"streaming"` and `"interpolated"`.

    Raises:
        ValueError: for another name.

    Example:

    >>> with force_vector_attention_method("dense"):
    ...     outputs = model(inputs)
    """
    token = _forced_method.set(_check_method(method))
    try:
        yield
    finally:
        _forced_method.reset(token)


def resolve_method(method, mask=None, dropout=0.0, gamma=False):
    """Returns the method that a call ends up with, or raises `ValueError`."""
    method = _check_method(method)
    if method == "auto":
        method = _forced_method.get() or "auto"
    unfit = []
    if mask is not None and len(mask.shape) == 3:
        unfit.append("a mask of pairs, of shape (batch, queries, keys)")
    if dropout > 0:
        unfit.append("dropout of the attention weights")
    if gamma:
        unfit.append("the projection `gamma`")
    if unfit and method == "interpolated":
        raise ValueError(
            f'`method="interpolated"` cannot take {unfit[0]}: it never forms single '
            'weights. Use `method="auto"` or `method="streaming"`.'
        )
    return "streaming" if unfit and method == "auto" else method


def dense(query, key, value, mask=None, scale=1.0, drop=None):
    """The definition: returns the outputs and the pair tensor of weights."""
    logits = ops.multiply(query[:, :, None], key[:, None])
    logits = ops.multiply(logits, ops.cast(scale, logits.dtype))
    if mask is not None:
        mask = ops.cast(mask, "bool")
        used = mask if len(mask.shape) == 2 else ops.any(mask, axis=1)
        mask = mask[:, None, :, None] if len(mask.shape) == 2 else mask[..., None]
        value = ops.where(used[:, :, None], value, ops.zeros_like(value))
        logits = ops.where(mask, logits, ops.full_like(logits, float("-inf")))
        # A softmax over nothing but -inf is NaN; such a row is defined to be zero.
        some = ops.any(mask, axis=2, keepdims=True)
        logits = ops.where(some, logits, ops.zeros_like(logits))
    weights = stored(ops.softmax(logits, axis=2))
    if mask is not None:
        weights = ops.where(mask, weights, ops.zeros_like(weights))
    if drop is not None:
        weights = weights * drop
    return ops.sum(ops.multiply(weights, value[:, None]), axis=2), weights


@functools.cache
def _function(method, num_terms, dtype, has_pairs, dropout, has_mask):
    """Returns the differentiable function of one method."""

    def extras(args):
        """Mask of pairs and dropout, for the streaming form alone."""
        rest = list(args[4:])
        pairs = rest.pop(0) if has_pairs else None
        seed = rest.pop(0) if dropout else None
        drop = dropout_factors(args[0], args[1], args[2], dropout, seed)
        return pairs, drop

    if method == "streaming":
        return with_gradient(
            *_streaming_pair(extras, center=not (dropout or has_pairs))
        )
    if method == "interpolated":
        size = _series.size(num_terms or INTERPOLATED_TERMS, dtype)
        return with_gradient(*_interpolated_pair(size, has_mask))
    return with_gradient(*_auto_pair(dtype, has_mask))


def _fused_function(method, num_terms, dtype, plain, packed=False):
    """Returns the function as one GPU kernel, or `None` where there is none."""
    if keras.backend.backend() != "jax" or method not in ("auto", "interpolated"):
        return None
    from tokenlearner_keras.ops import _fused

    # Not the shortest series: a channel that it does not reach costs its neighbours
    # quadratic time.
    is_short = method == "auto" and dtype == "bfloat16"
    count = BFLOAT16_TERMS if is_short else num_terms or INTERPOLATED_TERMS
    mode = _fused.mode(dtype)
    if mode is None or not 2 <= count <= INTERPOLATED_TERMS:
        return None
    size = _series.size(count, dtype if is_short else "float32")
    return _fused.attention(plain, size, method == "auto", mode == "interpret", packed)


def _centered(value, key_mask):
    """Returns values less their mean, and the mean, `(batch, 1, channels)`.

    The weights add up to one, so that the output moves with the mean; sums of smaller
    numbers lose less. Infinities stay as they are.
    """
    count = ops.maximum(ops.sum(key_mask, axis=1, keepdims=True), 1.0)
    mean = _series.finite_mean(ops.sum(value, axis=1, keepdims=True), count)
    return (value - mean) * key_mask, mean


def _streaming_pair(extras, center):
    """Forward and backward function of `"streaming"`."""

    def prepare(args):
        query, key, value, key_mask = args[:4]
        mean = ops.zeros_like(value[:, :1])
        if center:
            value, mean = _centered(value, key_mask)
        return (query, key, value, key_mask), mean

    def forward(*args):
        tensors, mean = prepare(args)
        results = _streaming.forward(*tensors, *extras(args))
        return results[0] + mean, results

    def backward(args, residuals, upstream):
        tensors, _ = prepare(args)
        output, denominator, slope = residuals
        gradients = _streaming.backward(
            *tensors, output, upstream / denominator, *extras(args)
        )
        return (upstream * slope, *gradients, *(None for _ in args[3:]))

    return forward, backward


def _form(query):
    """Returns what computes the moments on the device at hand.

    And the functions that bring tensors into its form and back.
    """
    form, channels = _wide if _wide.is_best() else _tiles, query.shape[-1]
    enter, leave = (
        functools.partial(function, channels=channels)
        for function in (form.enter, form.leave)
    )
    return form.weighted_moments, enter, leave


def _interpolated_pair(size, has_mask):
    """Forward and backward function of `"interpolated"`."""

    def forward(*args):
        moments, enter, leave = _form(args[0])
        query, key, value, mask = map(enter, args)
        mask = mask if has_mask else None
        frame = _series.frame(key, value, mask)
        sums = _series.key_sums(moments, key, value, mask, frame, size)
        output, kept = _series.outputs(query, sums, frame, size)
        # Never silently wrong.
        poison = ops.where(kept, ops.zeros_like(frame.mean), float("nan"))
        result = leave(output + (frame.mean + poison))
        return result, (output, poison, *frame, *sums)

    def backward(args, residuals, upstream):
        moments, enter, leave = _form(args[0])
        query, key, value, key_mask = map(enter, args)
        output, poison, middle, half, mean, *sums = residuals
        frame = _series.Frame(middle, half, mean)
        mask = key_mask if has_mask else None
        upstream = enter(upstream) + poison
        to_query, *rest = _series.gradients(
            moments, query, key, value, mask, sums, frame, output, upstream, size
        )
        return (*map(leave, (to_query, *(x * key_mask for x in rest))), None)

    return forward, backward


def _auto_pair(dtype, has_mask):
    """Forward and backward function of `"auto"`."""

    def sizes_for(query, key):
        tokens = max(query.shape[1] or 0, key.shape[1] or 0)
        return _series.sizes(dtype, tokens > _series.MANY_TOKENS)

    def forward(*args):
        sizes = sizes_for(*args[:2])
        number = len(sizes)
        moments, enter, leave = _form(args[0])
        query, key, value, key_mask = map(enter, args)
        mask = key_mask if has_mask else None
        frame = _series.frame(key, value, mask)
        sums = _series.key_sums(moments, key, value, mask, frame, sizes[0])
        like = args[0], query, ops.cast(0, "int32")

        def result(output, index):
            results = leave(output + frame.mean), output
            return *results, ops.cast(index, "int32")

        def shortest():
            return result(_series.outputs(query, sums, frame, sizes[0])[0], 0)

        def longer(index):
            more = _series.key_sums(moments, key, value, mask, frame, sizes[index])
            output, kept = _series.outputs(query, more, frame, sizes[index])
            return result(output, ops.where(ops.all(kept), index, number))

        def exact():
            query, key, value, key_mask = args
            centred = (value - leave(frame.mean)) * key_mask
            output = _streaming.forward(query, key, centred, key_mask, slopes=False)[0]
            return result(enter(output), number)

        def otherwise():
            z = ops.max(ops.abs(query) * frame.half)
            # More terms help against truncation, not against cancellation.
            choice = sum(ops.cast(z > size[1], "int32") for size in sizes)
            nothing = functools.partial(result, ops.zeros_like(query), number)
            branches = [functools.partial(longer, i) for i in range(1, number)]
            found = switch(choice, [nothing, *branches, nothing], like)
            return switch(
                ops.cast(found[2] == number, "int32"), [lambda: found, exact], like
            )

        # The moments of the shortest series are there before it is known to do: the
        # usual case then needs one decision.
        kept = ops.all(_series.fits(query, sums, frame, sizes[0]))
        choice = ops.cast(ops.logical_not(kept), "int32")
        output, centred, index = switch(choice, [shortest, otherwise], like)
        return output, (centred, index, *frame, *sums)

    def backward(args, residuals, upstream):
        sizes = sizes_for(*args[:2])
        moments, enter, leave = _form(args[0])
        output, index, middle, half, mean, *saved = residuals
        frame = _series.Frame(middle, half, mean)

        def series(index):
            def branch():
                query, key, value, key_mask = map(enter, args)
                mask = key_mask if has_mask else None
                sums = saved
                if index > 0:
                    sums = _series.key_sums(
                        moments, key, value, mask, frame, sizes[index]
                    )
                to_query, *rest = _series.gradients(
                    moments,
                    *(query, key, value, mask, sums, frame, output),
                    *(enter(upstream), sizes[index]),
                )
                return tuple(map(leave, (to_query, *(x * key_mask for x in rest))))

            return branch

        def exact():
            query, key, value, key_mask = args
            tensors = query, key, (value - leave(mean)) * key_mask, key_mask
            again, denominator, slope = _streaming.forward(*tensors)
            factor = upstream / denominator
            return (upstream * slope, *_streaming.backward(*tensors, again, factor))

        branches = [*map(series, range(len(sizes))), exact]
        return (*switch(index, branches, args[:3]), None)

    return forward, backward


def pair_mask_of(mask, query, key):
    """Returns any mask, `None` too, as booleans `(batch, queries, keys)`."""
    shape = (ops.shape(query)[0], ops.shape(query)[1], ops.shape(key)[1])
    if mask is None:
        return ops.ones(shape, "bool")
    mask = ops.cast(mask, "bool")
    return ops.broadcast_to(mask[:, None] if len(mask.shape) == 2 else mask, shape)


def dropout_factors(query, key, value, rate, seed=None):
    """Returns a function from indices to the factors of the weights, or `None`.

    The factors are a hash of the position, so that the backward pass finds the same
    ones without any stored tensor.
    """
    if not rate:
        return None
    seed = ops.cast(ops.convert_to_tensor(seed), "int32")
    batch, queries = ops.shape(query)[0], ops.shape(query)[1]
    keys, channels = ops.shape(key)[1], ops.shape(value)[2]

    def factors(query_indices, key_indices):
        i = ops.cast(query_indices, "int32")[None, :, None, None]
        j = ops.cast(key_indices, "int32")[None, None, :, None]
        b = ops.arange(batch, dtype="int32")[:, None, None, None]
        c = ops.arange(channels, dtype="int32")
        x = ((b * queries + i) * keys + j) * channels + c
        # A finalizer of the murmur3 family, on integers that wrap around.
        x = ops.bitwise_xor(x, seed[0])
        for factor, shift in ((0x7FEB352D, 16), (-0x7B935975, 15), (0x2C1B3C6D, 16)):
            x = x * ops.convert_to_tensor(factor, "int32") + seed[1]
            high = ops.bitwise_and(ops.right_shift(x, shift), (1 << (32 - shift)) - 1)
            x = ops.bitwise_xor(x, high)
        uniform = ops.cast(ops.bitwise_and(x, (1 << 24) - 1), query.dtype) / (1 << 24)
        return ops.cast(uniform >= rate, query.dtype) / (1 - rate)

    return factors


def _dense_dropout(query, key, rate, seed):
    if not rate:
        return None
    indices = (ops.arange(ops.shape(x)[1]) for x in (query, key))
    return dropout_factors(query, key, key, rate, seed)(*indices)


def _check_shapes(query, key, value, mask):
    shapes = [tuple(x.shape) for x in (query, key, value)]
    message = f"Received: query {shapes[0]}, key {shapes[1]}, value {shapes[2]}"
    if any(len(shape) != 3 for shape in shapes):
        raise ValueError(
            "Arguments `query`, `key` and `value` must have rank 3 (batch, tokens, "
            f"channels). {message}"
        )
    if len({shape[-1] for shape in shapes}) > 1:
        raise ValueError(
            "Arguments `query`, `key` and `value` must have the same channels: each "
            f"channel has its own softmax. {message}"
        )
    if _differ(shapes[1][1], shapes[2][1]):
        raise ValueError(
            "Arguments `key` and `value` must have the same number of tokens. "
            f"{message}"
        )
    if mask is None:
        return
    expected = [(shapes[1][1],), (shapes[0][1], shapes[1][1])]
    shape = tuple(mask.shape)
    if len(shape) not in (2, 3) or any(
        _differ(a, b) for a, b in zip(shape[1:], expected[len(shape) - 2])
    ):
        raise ValueError(
            "Argument `mask` must have shape (batch, keys) or (batch, queries, keys). "
            f"Received: mask of shape {shape} for query {shapes[0]}, key {shapes[1]}"
        )


def _differ(a, b):
    return a is not None and b is not None and a != b


def _check_method(method):
    if method not in METHODS:
        raise ValueError(
            "Invalid value for argument `method`. Expected one of "
            f"{METHODS}. Received: method={method!r}"
        )
    return method
