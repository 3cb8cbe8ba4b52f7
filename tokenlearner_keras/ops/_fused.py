"""Vector attention in one GPU kernel a direction, for the JAX backend (Pallas, Triton).

Each program has one batch entry and a few channels. It computes the moments and the
series of `ops/_series.py`, checks what the series needs, and where that does not hold
computes the sums of `ops/_streaming.py` for its own channels instead. So nobody waits
for a choice, and a difficult channel slows down nobody but its neighbours.
"""

import contextlib
import contextvars
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from tokenlearner_keras.ops import _series

# Sums of this many rows between two of Kahan's corrections, as in `_streaming`.
BLOCK = 4
# The reciprocal of a larger range of keys would not be a normal number.
MAX_HALF = 1e30


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of one kernel: channels and warps of a program.

    The series has one row a thread and step; the limits of the keys and the exact sums
    have `exact`.
    """

    columns: int = 8
    warps: int = 4
    exact: int = 4
    stages: int = 1

    @property
    def rows(self):
        return max(1, 32 * self.warps // self.columns)


FORWARD = Tiles()
BACKWARD = Tiles()

_forced = contextvars.ContextVar("vector_attention_fused", default=None)


@contextlib.contextmanager
def force(mode):
    """Traces with the kernel (`"kernel"`, `"interpret"`) or without (`"off"`)."""
    token = _forced.set(mode)
    try:
        yield
    finally:
        _forced.reset(token)


def mode(dtype):
    """Returns `"kernel"`, `"interpret"` or `None`, for float32 tensors alone."""
    if dtype != "float32":
        return None
    forced = _forced.get()
    if forced is not None:
        return None if forced == "off" else forced
    return "kernel" if jax.default_backend() == "gpu" else None


@functools.cache
def attention(plain, size, exact, interpret=False):
    """Returns the attention function of `(query, key, value, key_mask)`.

    Args:
        plain: The same function without a kernel, of float32 arrays. Second derivatives
            are its.
        size: One of `_series.sizes()`.
        exact: bool. Whether channels that the series does not fit are computed exactly;
            otherwise they become NaN.
        interpret: bool. Whether to run without a GPU, for tests.

    Returns:
        Function of three arrays `(batch, tokens, channels)` of float32 or less, and a
        float32 mask `(batch, keys, 1)` of ones and zeros, or `None`. Keys and values
        must be zero where masked. The output has the dtype of the values.
    """
    run = functools.partial(_forward, size=size, exact=exact, interpret=interpret)

    def plain_gradients(query, key, value, key_mask, upstream):
        mask = jnp.ones_like(key[:, :, :1], "float32") if key_mask is None else key_mask

        def outputs(*tensors):
            tensors = (x.astype(jnp.float32) for x in tensors)
            return plain(*tensors, mask).astype(value.dtype)

        _, pullback = jax.vjp(outputs, query, key, value)
        return pullback(upstream)

    # What the forward kernel leaves behind depends on the arguments alone, so that the
    # derivative of the gradients by the arguments is all there is.
    @jax.custom_vjp
    def gradients(args, saved, upstream):
        return _backward(
            *args, *saved, upstream, size=size, exact=exact, interpret=interpret
        )

    def gradients_rule(args, saved, upstream):
        return gradients(args, saved, upstream), (args, saved, upstream)

    def second_rule(residuals, upstreams):
        (*tensors, key_mask), saved, upstream = residuals
        _, pullback = jax.vjp(
            lambda q, k, v, g: plain_gradients(q, k, v, key_mask, g), *tensors, upstream
        )
        *to_args, to_upstream = pullback(upstreams)
        to_args.append(_zeros(key_mask))
        return tuple(to_args), _zeros(saved), to_upstream

    gradients.defvjp(gradients_rule, second_rule)

    # A function of its own, so that the kernel itself is never differentiated.
    @jax.custom_vjp
    def outputs(*args):
        return run(*args, save=True)

    def outputs_rule(*args):
        results = outputs(*args)
        return results, (args, results[1:])

    def backward_rule(residuals, upstreams):
        args, saved = residuals
        return *gradients(args, saved, upstreams[0]), _zeros(args[3])

    outputs.defvjp(outputs_rule, backward_rule)

    @jax.custom_vjp
    def function(*args):
        return run(*args, save=False)[0]

    function.defvjp(
        lambda *args: ((results := outputs(*args))[0], (args, results[1:])),
        lambda residuals, upstream: backward_rule(residuals, (upstream,)),
    )
    return lambda query, key, value, mask=None: function(query, key, value, mask)


def _zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def _forward(query, key, value, key_mask, *, size, exact, save, interpret):
    """Returns outputs; with `save` also what `_backward` needs."""
    tiles, count = FORWARD, size[0]
    batch, tokens, channels = query.shape
    shapes, dtypes = [query.shape], [value.dtype, *[jnp.float32] * 4]
    if save:
        # Limits and mean and flags; moments; centred outputs and denominators.
        shapes += [(batch, 4, channels), (batch, 2, count + 1, channels)]
        shapes += [query.shape, query.shape]
    kernel = functools.partial(
        _forward_kernel,
        sizes=(tokens, key.shape[1], channels),
        tiles=tiles,
        size=size,
        exact=exact,
        save=save,
        masked=key_mask is not None,
        interpret=interpret,
    )
    masks = [] if key_mask is None else [key_mask[:, :, 0]]
    return pl.pallas_call(
        kernel,
        out_shape=tuple(map(jax.ShapeDtypeStruct, shapes, dtypes)),
        grid=(batch, pl.cdiv(channels, tiles.columns)),
        compiler_params=triton.CompilerParams(
            num_warps=tiles.warps, num_stages=tiles.stages
        ),
        interpret=interpret,
        name="vector_attention_forward",
    )(query, key, value, *masks)


def _backward(
    query,
    key,
    value,
    key_mask,
    stats,
    sums,
    output,
    denominator,
    upstream,
    *,
    size,
    exact,
    interpret,
):
    """Returns the gradients of query, key and value."""
    tiles = BACKWARD
    batch, tokens, channels = query.shape
    kernel = functools.partial(
        _backward_kernel,
        sizes=(tokens, key.shape[1], channels),
        tiles=tiles,
        size=size,
        exact=exact,
        masked=key_mask is not None,
        interpret=interpret,
    )
    masks = [] if key_mask is None else [key_mask[:, :, 0]]
    return pl.pallas_call(
        kernel,
        out_shape=tuple(
            jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)
        ),
        grid=(batch, pl.cdiv(channels, tiles.columns)),
        compiler_params=triton.CompilerParams(
            num_warps=tiles.warps, num_stages=tiles.stages
        ),
        interpret=interpret,
        name="vector_attention_backward",
    )(query, key, value, *masks, upstream, output, denominator, stats, sums)


class _Program:
    """Where this program reads and writes."""

    def __init__(self, sizes, tiles):
        self.queries, self.keys, self.channels = sizes
        self.tiles = tiles
        self.batch = pl.program_id(0)
        width, start = tiles.columns, pl.program_id(1) * tiles.columns
        self.columns = pl.ds(start, width)
        self.inside = None
        if self.channels % width:
            self.inside = start + jnp.arange(width) < self.channels

    def steps(self, length, rows):
        return pl.cdiv(length, rows)

    def rows_inside(self, start, rows, length):
        """Which rows of a tile exist, `(rows, 1)`, or `None` for all."""
        if length % rows == 0:
            return None
        return (start + jnp.arange(rows) < length)[:, None]

    def _mask(self, start, rows, length):
        shape = (rows, self.tiles.columns)
        parts = [self.rows_inside(start, rows, length)]
        parts.append(None if self.inside is None else self.inside[None])
        parts = [jnp.broadcast_to(p, shape) for p in parts if p is not None]
        return functools.reduce(jnp.logical_and, parts) if parts else None

    def load(self, ref, start, rows, length, other=0.0):
        """Loads a tile, `other` where there is nothing."""
        mask = self._mask(start, rows, length)
        view = ref.at[self.batch, pl.ds(start, rows), self.columns]
        return _load(view, mask, other)

    def store(self, ref, start, rows, length, x):
        mask = self._mask(start, rows, length)
        view = ref.at[self.batch, pl.ds(start, rows), self.columns]
        triton.store(view, x.astype(ref.dtype), mask=mask)

    def load_row(self, ref, *indices, other=0.0):
        """Loads one number a channel."""
        return _load(ref.at[self._row(indices)], self.inside, other)

    def store_row(self, ref, *indices, x):
        triton.store(ref.at[self._row(indices)], x, mask=self.inside)

    def _row(self, indices):
        # The interpreter takes arrays only, not numbers.
        zero = self.batch * 0
        return (self.batch, *(zero + i for i in indices), self.columns)

    def valid(self, mask_ref, start, rows):
        """Which keys of a tile count, as booleans `(rows, 1)`, or `None` for all."""
        inside = self.rows_inside(start, rows, self.keys)
        if mask_ref is None:
            return inside
        view = mask_ref.at[self.batch, pl.ds(start, rows)]
        if inside is None:
            return (triton.load(view) > 0)[:, None]
        return (triton.load(view, mask=inside[:, 0], other=0.0) > 0)[:, None]

    def valid_row(self, mask_ref, index, length):
        """An index that exists and whether its row counts, or `None` for yes."""
        kept = None
        if length % BLOCK:
            kept = index < length
            index = jnp.minimum(index, length - 1)
        if mask_ref is not None:
            found = triton.load(mask_ref.at[self.batch, index]) > 0
            kept = found if kept is None else jnp.logical_and(kept, found)
        return index, kept


def _load(view, mask, other):
    """Loads float32, of whatever dtype, and `other` where the mask is false."""
    if mask is None:
        return triton.load(view).astype(jnp.float32)
    return triton.load(view, mask=mask, other=other).astype(jnp.float32)


def _where(mask, x, otherwise=0.0):
    """`x` where the mask (or all, for `None`) is true."""
    if mask is None:
        return x
    return jnp.where(jnp.broadcast_to(mask, x.shape), x, otherwise)


def _forward_kernel(*refs, sizes, tiles, size, exact, save, masked, interpret):
    q_ref, k_ref, v_ref, *refs = refs
    mask_ref = refs.pop(0) if masked else None
    y_ref, *saved_refs = refs
    here = _Program(sizes, tiles)
    queries, keys, _ = sizes
    count, reach, scales = size
    rows, wide = tiles.rows, tiles.rows * tiles.exact
    tile = (rows, tiles.columns)

    low, high, mean, key_sum = _limits(here, k_ref, v_ref, mask_ref, wide)
    middle, half, inverse = _geometry(low, high)

    # The derivative starts at the second moment.
    powers = count + 1 if save else count

    def load_keys(step):
        start = step * rows
        return tuple(here.load(r, start, rows, keys) for r in (k_ref, v_ref))

    def add_keys(step, tiles, sums):
        (k, v), valid = tiles, here.valid(mask_ref, step * rows, rows)
        t = _where(valid, (k - middle) * inverse)
        return _add_powers(
            sums, t, _where(valid, jnp.ones_like(t)), _where(valid, v - mean)
        )

    zeros = (jnp.zeros(tile, jnp.float32),) * (2 * powers)
    sums = _pipelined(here.steps(keys, rows), load_keys, add_keys, zeros)
    sums = [jnp.sum(s, axis=0) for s in sums]
    m0, m1 = sums[:powers], sums[powers:]
    if save:
        for p in range(powers):
            here.store_row(saved_refs[1], 0, p, x=m0[p])
            here.store_row(saved_refs[1], 1, p, x=m1[p])
    # Without any valid key every sum is zero, and so is the output.
    empty = jnp.where(m0[0] == 0, 1.0, 0.0)
    lower = [scales[p] * m0[p] for p in range(count)]
    upper = [scales[p] * m1[p] for p in range(count)]

    def load_queries(step):
        return here.load(q_ref, step * rows, rows, queries)

    def evaluate(step, q, carry):
        largest, cancellation = carry
        start = step * rows
        s = q * (half / reach)
        even, odd = _halves(lower, s)
        denominator = even + odd + empty
        factor = 1.0 / denominator
        output = sum(_halves(upper, s)) * factor
        here.store(y_ref, start, rows, queries, output + mean)
        if save:
            here.store(saved_refs[2], start, rows, queries, output)
            here.store(saved_refs[3], start, rows, queries, denominator)
        # The sum at -s: there, what alternates here has the same sign.
        ratio = (even - odd) * factor
        ratio = _where(here.rows_inside(start, rows, queries), ratio * ratio)
        return jnp.maximum(largest, jnp.abs(q)), cancellation + ratio

    zero = jnp.zeros(tile, jnp.float32)
    steps = here.steps(queries, rows)
    largest, cancellation = _pipelined(steps, load_queries, evaluate, (zero, zero))
    z = jnp.max(largest, axis=0) * half
    cancellation = jnp.sum(cancellation, axis=0) / queries
    # Comparisons that NaN fails. A NaN among the queries is one in `cancellation`.
    kept = z <= reach
    kept = jnp.logical_and(kept, cancellation <= _series.MAX_CANCELLATION**2)
    for number in (m1[0], key_sum):
        kept = jnp.logical_and(kept, jnp.abs(number) < float("inf"))
    kept = jnp.logical_and(kept, half <= MAX_HALF)
    bad = jnp.where(kept, 0.0, 1.0)
    if here.inside is not None:
        bad = jnp.where(here.inside, bad, 0.0)
    if save:
        for i, x in enumerate((low, high, mean, bad)):
            here.store_row(saved_refs[0], i, x=x)

    if not interpret:
        # What follows overwrites what other threads may have written.
        triton.debug_barrier()

    @pl.when(jnp.sum(bad) > 0)
    def _():
        if exact:
            _exact_forward(here, q_ref, k_ref, v_ref, mask_ref, low, high, mean)(
                y_ref, *saved_refs[2:]
            )
        else:
            _poison(here, y_ref, bad)


def _limits(here, k_ref, v_ref, mask_ref, rows):
    """Returns the smallest and largest key, the mean value and the sum of the keys."""
    tile = (rows, here.tiles.columns)
    masked = mask_ref is not None

    def load(step):
        start = step * rows
        return tuple(here.load(r, start, rows, here.keys) for r in (k_ref, v_ref))

    def body(step, tiles, carry):
        low, high, keys, values, count = carry
        (k, v), valid = tiles, here.valid(mask_ref, step * rows, rows)
        low = jnp.minimum(low, _where(valid, k, float("inf")))
        high = jnp.maximum(high, _where(valid, k, -float("inf")))
        if masked:
            count = count + _where(valid, jnp.ones_like(k))
        return low, high, keys + k, values + v, count

    zero = jnp.zeros(tile, jnp.float32)
    infinity = jnp.full(tile, float("inf"), jnp.float32)
    low, high, keys, values, count = _pipelined(
        here.steps(here.keys, rows),
        load,
        body,
        (infinity, -infinity, zero, zero, zero),
    )
    low, high = jnp.min(low, axis=0), jnp.max(high, axis=0)
    empty = low > high
    low, high = (jnp.where(empty, 0.0, x) for x in (low, high))
    count = jnp.maximum(jnp.sum(count, axis=0), 1.0) if masked else float(here.keys)
    mean = jnp.sum(values, axis=0) / count
    mean = jnp.where(jnp.abs(mean) < float("inf"), mean, 0.0)
    return low, high, mean, jnp.sum(keys, axis=0)


def _geometry(low, high):
    """Returns the middle of the keys, half their range and its reciprocal."""
    half = jnp.maximum(high / 2 - low / 2, 1e-20)
    return low / 2 + high / 2, half, 1.0 / half


def _pipelined(steps, load, body, init):
    """A loop whose tiles are loaded one round ahead, while the one before is used."""

    def round(step, carry):
        tiles, carry = carry
        following = load(jnp.minimum(step + 1, steps - 1))
        return following, body(step, tiles, carry)

    return jax.lax.fori_loop(0, steps, round, (load(0), init))[1]


def _add_powers(sums, x, first, second):
    """Adds `x^p first` and `x^p first second` to the sums, p < half their number."""
    count = len(sums) // 2
    sums0, sums1 = [], []
    for p in range(count):
        if p > 0:
            first = first * x
        sums0.append(sums[p] + first)
        sums1.append(sums[count + p] + first * second)
    return (*sums0, *sums1)


def _halves(coefficients, x):
    """Returns the even and the odd part of a polynomial, coefficients `(columns,)`."""
    square = x * x
    parts = []
    for part in (coefficients[0::2], coefficients[1::2]):
        result = jnp.zeros_like(x) + part[-1]
        for c in reversed(part[:-1]):
            result = result * square + c
        parts.append(result)
    return parts[0], x * parts[1]


def _poison(here, y_ref, bad):
    rows = here.tiles.rows
    shape = (rows, here.tiles.columns)

    def body(step, carry):
        start = step * rows
        mask = jnp.broadcast_to(bad[None] > 0, shape)
        inside = here.rows_inside(start, rows, here.queries)
        if inside is not None:
            mask = jnp.logical_and(mask, jnp.broadcast_to(inside, shape))
        view = y_ref.at[here.batch, pl.ds(start, rows), here.columns]
        triton.store(view, jnp.full(shape, float("nan"), y_ref.dtype), mask=mask)
        return carry

    jax.lax.fori_loop(0, here.steps(here.queries, rows), body, 0)


def _exact_forward(here, q_ref, k_ref, v_ref, mask_ref, low, high, mean):
    """Returns a function that writes exact outputs, and denominators."""
    rows = here.tiles.rows * here.tiles.exact

    def write(y_ref, output_ref=None, denominator_ref=None):
        def body(step, carry):
            start = step * rows
            q = here.load(q_ref, start, rows, here.queries)
            reference = jnp.where(q >= 0, high, low)

            def part(index):
                index, kept = here.valid_row(mask_ref, index, here.keys)
                k = here.load_row(k_ref, index)[None] - reference
                v = here.load_row(v_ref, index)[None] - mean
                weight = _where(kept, jnp.exp(_where(kept, q * k)))
                return weight, weight * _where(kept, jnp.broadcast_to(v, q.shape))

            denominator, output = _exact_sums(here.keys, part, q.shape)
            denominator = jnp.where(denominator == 0, 1.0, denominator)
            output = output / denominator
            here.store(y_ref, start, rows, here.queries, output + mean)
            if output_ref is not None:
                here.store(output_ref, start, rows, here.queries, output)
                here.store(denominator_ref, start, rows, here.queries, denominator)
            return carry

        jax.lax.fori_loop(0, here.steps(here.queries, rows), body, 0)

    return write


def _exact_sums(length, part, shape):
    """Returns both sums of `part(index)` over the indices, with Kahan's correction."""

    def body(step, carry):
        sums = [jnp.zeros(shape, jnp.float32)] * 2
        for i in range(BLOCK):
            sums = [s + p for s, p in zip(sums, part(step * BLOCK + i))]
        results, corrections = [], []
        for total, correction, new in zip(carry[:2], carry[2:], sums):
            new = new - correction
            result = total + new
            correction = (result - total) - new
            # An infinite sum has none; inf - inf must not make it NaN.
            correction = jnp.where(correction == correction, correction, 0.0)
            results.append(result)
            corrections.append(correction)
        return (*results, *corrections)

    zeros = (jnp.zeros(shape, jnp.float32),) * 4
    return jax.lax.fori_loop(0, pl.cdiv(length, BLOCK), body, zeros)[:2]


def _backward_kernel(*refs, sizes, tiles, size, exact, masked, interpret):
    q_ref, k_ref, v_ref, *refs = refs
    mask_ref = refs.pop(0) if masked else None
    g_ref, y_ref, denominator_ref, stats_ref, sums_ref, *results = refs
    here = _Program(sizes, tiles)
    low, high, mean, bad = (here.load_row(stats_ref, i) for i in range(4))
    arguments = here, q_ref, k_ref, v_ref, mask_ref, g_ref, y_ref, denominator_ref
    if not exact:
        # Never silently wrong.
        poison = jnp.where(bad > 0, float("nan"), 0.0)
        _series_backward(*arguments, sums_ref, low, high, mean, poison, size, *results)
        return
    difficult = jnp.sum(bad) > 0

    @pl.when(jnp.logical_not(difficult))
    def _():
        _series_backward(*arguments, sums_ref, low, high, mean, None, size, *results)

    @pl.when(difficult)
    def _():
        _exact_backward(*arguments, low, high, mean, *results)


def _series_backward(
    here,
    q_ref,
    k_ref,
    v_ref,
    mask_ref,
    g_ref,
    y_ref,
    denominator_ref,
    sums_ref,
    low,
    high,
    mean,
    poison,
    size,
    to_q_ref,
    to_k_ref,
    to_v_ref,
):
    count, reach, scales = size
    rows = here.tiles.rows
    middle, half, inverse = _geometry(low, high)

    def load_queries(step):
        start = step * rows
        denominator = here.load(denominator_ref, start, rows, here.queries, 1.0)
        tiles = (here.load(r, start, rows, here.queries) for r in (q_ref, g_ref, y_ref))
        return (*tiles, denominator)

    def scale_queries(tiles):
        q, g, y, denominator = tiles
        if poison is not None:
            g = g + poison
        return q * (half / reach), g / denominator, y

    lower, upper = (
        [scales[p] * here.load_row(sums_ref, i, p + 1) for p in range(count)]
        for i in range(2)
    )

    def to_queries(step, tiles, carry):
        start = step * rows
        s, factor, y = scale_queries(tiles)
        slope = sum(_halves(upper, s)) - y * sum(_halves(lower, s))
        here.store(to_q_ref, start, rows, here.queries, factor * half * slope)
        return carry

    steps = here.steps(here.queries, rows)
    _pipelined(steps, load_queries, to_queries, 0)

    def add_queries(step, tiles, sums):
        s, factor, y = scale_queries(tiles)
        return _add_powers(sums, s, factor, y)

    zeros = (jnp.zeros((rows, here.tiles.columns), jnp.float32),) * (2 * count + 2)
    sums = _pipelined(steps, load_queries, add_queries, zeros)
    sums = [jnp.sum(x, axis=0) for x in sums]
    h, hy = sums[: count + 1], sums[count + 1 :]

    def load_keys(step):
        start = step * rows
        return tuple(here.load(r, start, rows, here.keys) for r in (k_ref, v_ref))

    def to_keys(step, tiles, carry):
        k, v = tiles
        start = step * rows
        valid = here.valid(mask_ref, start, rows)
        t = _where(valid, (k - middle) * inverse)
        # Ratios of coefficients, so that three series share the same numbers.
        series = [jnp.zeros_like(t) + x[count - 1] for x in (h, h[1:], hy[1:])]
        for p in range(count - 2, -1, -1):
            x = t * (scales[p + 1] / scales[p])
            series = [
                s * x + c[p] for s, c in zip(series, (h, h[1:], hy[1:]), strict=True)
            ]
        to_v, to_k, to_k_less = (scales[0] * s for s in series)
        to_k = ((v - mean) * to_k - to_k_less) * (reach * inverse)
        here.store(to_k_ref, start, rows, here.keys, _where(valid, to_k))
        here.store(to_v_ref, start, rows, here.keys, _where(valid, to_v))
        return carry

    _pipelined(here.steps(here.keys, rows), load_keys, to_keys, 0)


def _exact_backward(
    here,
    q_ref,
    k_ref,
    v_ref,
    mask_ref,
    g_ref,
    y_ref,
    denominator_ref,
    low,
    high,
    mean,
    to_q_ref,
    to_k_ref,
    to_v_ref,
):
    rows = here.tiles.rows * here.tiles.exact

    def to_queries(step, carry):
        start = step * rows
        q, g, y = (
            here.load(r, start, rows, here.queries) for r in (q_ref, g_ref, y_ref)
        )
        denominator = here.load(denominator_ref, start, rows, here.queries, 1.0)
        reference = jnp.where(q >= 0, high, low)

        def part(index):
            index, kept = here.valid_row(mask_ref, index, here.keys)
            k = here.load_row(k_ref, index)[None] - reference
            v = here.load_row(v_ref, index)[None] - mean
            weight = jnp.exp(_where(kept, q * k))
            # The difference first: the difference of two sums would lose digits.
            return (_where(kept, weight * k * (v - y)),) * 2

        slope = _exact_sums(here.keys, part, q.shape)[0]
        here.store(to_q_ref, start, rows, here.queries, slope * (g / denominator))
        return carry

    jax.lax.fori_loop(0, here.steps(here.queries, rows), to_queries, 0)

    def to_keys(step, carry):
        start = step * rows
        valid = here.valid(mask_ref, start, rows)
        k, v = (here.load(r, start, rows, here.keys) for r in (k_ref, v_ref))
        v = v - mean

        def part(index):
            index, kept = here.valid_row(None, index, here.queries)
            q, g, y = (here.load_row(r, index) for r in (q_ref, g_ref, y_ref))
            factor = g / here.load_row(denominator_ref, index, other=1.0)
            reference = jnp.where(q >= 0, high, low)
            weight = jnp.exp(_where(valid, q[None] * (k - reference[None])))
            weight = _where(kept, weight * factor[None])
            return weight * q[None] * (v - y[None]), weight

        to_k, to_v = _exact_sums(here.queries, part, k.shape)
        here.store(to_k_ref, start, rows, here.keys, _where(valid, to_k))
        here.store(to_v_ref, start, rows, here.keys, _where(valid, to_v))
        return carry

    jax.lax.fori_loop(0, here.steps(here.keys, rows), to_keys, 0)
