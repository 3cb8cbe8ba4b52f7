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
from tokenlearner_keras.ops._batch_parallel import batch_parallel
from tokenlearner_keras.ops._kernels import with_kernels

# Sums of this many rows between two of Kahan's corrections, as in `_streaming`.
BLOCK = 4
# The reciprocal of a larger range of keys would not be a normal number.
MAX_HALF = 1e30
# Tiles whose sums over the rows are taken together.
TOTALS = 32


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of one kernel: channels and warps of a program.

    A tile has one number a thread. The loops over the series load `together` tiles
    while they use as many; a step of the limits of the keys and of the exact sums takes
    `group`.
    """

    columns: int
    warps: int
    together: int = 2
    group: int = 4

    @property
    def rows(self):
        return max(1, 32 * self.warps // self.columns)

    @property
    def shape(self):
        return self.rows, self.columns


def tiles(batch, channels, dtypes):
    """Returns the sizes that were the fastest on an H200 at 8 to 32 examples."""
    # What a row of a tile reads is a sector of memory, of 32 bytes.
    columns = 32 // max(jnp.dtype(dtype).itemsize for dtype in dtypes)
    # More threads where there are fewer programs than the GPU takes at once.
    few = batch * pl.cdiv(channels, columns) <= 264
    return Tiles(columns, 8 if few else 4)


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
    """Returns `"kernel"`, `"interpret"` or `None`, which is all for float64."""
    if dtype == "float64":
        return None
    forced = _forced.get()
    if forced is not None:
        return None if forced == "off" else forced
    return "kernel" if jax.default_backend() == "gpu" else None


@functools.cache
def attention(plain, size, exact, interpret=False, packed=False):
    """Returns the attention function of `(query, key, value, key_mask)`.

    Or of `(tensor, key_mask)`, where the three are side by side in one tensor.

    Args:
        plain: The same function without a kernel, of float32 arrays. Second derivatives
            are its.
        size: One of `_series.sizes()`.
        exact: bool. Whether channels that the series does not fit are computed exactly;
            otherwise they become NaN.
        interpret: bool. Whether to run without a GPU, for tests.
        packed: bool. Whether queries, keys and values are one tensor
            `(batch, tokens, 3 * channels)`.

    Returns:
        Function of three arrays `(batch, tokens, channels)` of float32 or less, and a
        float32 mask `(batch, keys, 1)` of ones and zeros, or `None`. Keys and values
        must be zero where masked. The output has the dtype of the values.
    """
    options = {"size": size, "exact": exact, "interpret": interpret}

    def array_operations(tensors, key_mask):
        query, key, value = jnp.split(*tensors, 3, axis=2) if packed else tensors
        mask = key_mask
        if mask is None:
            mask = jnp.ones_like(key[:, :, :1], "float32")
        result = plain(*(x.astype(jnp.float32) for x in (query, key, value)), mask)
        return result.astype(value.dtype)

    function = with_kernels(
        lambda tensors, mask, save: _forward((*tensors, mask), save=save, **options),
        lambda tensors, mask, saved, upstream: tuple(
            _backward((*tensors, mask), *saved, upstream, **options)
        ),
        array_operations,
    )
    number = 1 if packed else 3
    return lambda *args: function(args[:number], *(args[number:] or [None]))


def _operands(args):
    """Returns query, key and value, their first columns, the mask and the sizes.

    Where one tensor holds all three, it is each of them.
    """
    *tensors, key_mask = args
    query, key, value = tensors if len(tensors) == 3 else tensors * 3
    starts, channels = (0, 0, 0), value.shape[2]
    if len(tensors) == 1:
        channels //= 3
        starts = (0, channels, 2 * channels)
    masks = [] if key_mask is None else [key_mask[:, :, 0]]
    sizes = (query.shape[1], key.shape[1], channels)
    return [query, key, value, *masks], starts, sizes


def _forward(args, *, size, exact, save, interpret):
    """Returns outputs; with `save` also what `_backward` needs."""
    count = size[0]
    operands, starts, sizes = _operands(args)
    tokens, _, channels = sizes
    shapes, dtypes = [(tokens, channels)], [operands[2].dtype, *[jnp.float32] * 4]
    if save:
        # Limits and mean and flags; moments; centred outputs and denominators.
        shapes += [(4, channels), (2, count + 1, channels), *shapes * 2]
    kernel = functools.partial(
        _forward_kernel,
        sizes=sizes,
        starts=starts,
        size=size,
        exact=exact,
        save=save,
        masked=len(operands) > 3,
        interpret=interpret,
    )
    name = "vector_attention_forward"
    return _run(name, kernel, channels, zip(shapes, dtypes), operands)


def _backward(
    args,
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
    """Returns the gradients of the tensors."""
    operands, starts, sizes = _operands(args)
    kernel = functools.partial(
        _backward_kernel,
        sizes=sizes,
        starts=starts,
        size=size,
        exact=exact,
        masked=len(operands) > 3,
        interpret=interpret,
    )
    operands += [upstream, output, denominator, stats, sums]
    results = ((x.shape[1:], x.dtype) for x in args[:-1])
    name = "vector_attention_backward"
    return _run(name, kernel, sizes[2], results, operands)


def _run(name, kernel, channels, results, operands):
    """Runs a program for each example and a few channels.

    `results` are the shapes of an example's, and the dtypes.
    """
    results = list(results)

    def run(*operands):
        batch = operands[0].shape[0]
        sizes = tiles(batch, channels, [x.dtype for x in operands[:3]])
        return pl.pallas_call(
            functools.partial(kernel, tiles=sizes),
            out_shape=tuple(
                jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in results
            ),
            grid=(batch, pl.cdiv(channels, sizes.columns)),
            compiler_params=triton.CompilerParams(num_warps=sizes.warps, num_stages=1),
            interpret=kernel.keywords["interpret"],
            name=name,
        )(*operands)

    return batch_parallel(run)(*operands)


class _Program:
    """Where this program reads and writes.

    Tiles are `(rows, columns)`. One number a channel is a tile as well, whose rows are
    equal. A reference to columns of a wider array is a pair: that, and the first.
    """

    def __init__(self, sizes, tiles, interpret):
        self.queries, self.keys, self.channels = sizes
        self.tiles, self.interpret = tiles, interpret
        self.batch = pl.program_id(0)
        width, start = tiles.columns, pl.program_id(1) * tiles.columns
        self.columns = (start + jnp.arange(width))[None]
        self.inside = None
        if self.channels % width:
            self.inside = self.columns < self.channels

    def steps(self, length, group=1):
        """How many steps of `group` tiles cover a length."""
        return pl.cdiv(length, group * self.tiles.rows)

    def group(self, step):
        """Returns the tiles of a step of `group` tiles, by number."""
        return [step * self.tiles.group + i for i in range(self.tiles.group)]

    def loop(self, length, load, body, init):
        """A loop over the tiles of a length, as `pipelined`."""
        return pipelined(self.steps(length), load, body, init, self.tiles.together)

    def _rows(self, tile):
        """Returns the rows of a tile, `(rows, 1)`."""
        rows = self.tiles.rows
        return (tile * rows + jnp.arange(rows))[:, None]

    def rows_inside(self, tile, length):
        """Which rows of a tile exist, `(rows, 1)`, or `None` for all."""
        if length % (self.tiles.rows * self.tiles.group) == 0:
            return None
        return self._rows(tile) < length

    def _view(self, ref, *index, mask):
        """Returns a view of a tile and which of it exists."""
        shape = self.tiles.shape
        ref, start = ref if isinstance(ref, tuple) else (ref, 0)
        # The interpreter takes arrays only, not numbers.
        index = [jnp.broadcast_to(self.batch * 0 + i, shape) for i in index]
        masks = [
            jnp.broadcast_to(m, shape) for m in (mask, self.inside) if m is not None
        ]
        mask = functools.reduce(jnp.logical_and, masks) if masks else None
        batch, columns = (
            jnp.broadcast_to(i, shape) for i in (self.batch, self.columns + start)
        )
        return ref.at[(batch, *index, columns)], mask

    def load(self, ref, tile, length, other=0.0):
        """Loads a tile, `other` where there is nothing."""
        inside = self.rows_inside(tile, length)
        return _load(*self._view(ref, self._rows(tile), mask=inside), other)

    def store(self, ref, tile, length, x, mask=None):
        """Stores a tile, where it exists (and the mask is true)."""
        inside = self.rows_inside(tile, length)
        if mask is not None:
            inside = mask if inside is None else jnp.logical_and(mask, inside)
        view, mask = self._view(ref, self._rows(tile), mask=inside)
        triton.store(view, x.astype(view.dtype), mask=mask)

    def load_row(self, ref, *index, other=0.0):
        """Loads one number a channel."""
        return _load(*self._view(ref, *index, mask=None), other)

    def store_row(self, ref, *index, x):
        """Stores one number a channel, the same from each row."""
        view, mask = self._view(ref, *index, mask=None)
        triton.store(view, x, mask=mask)

    def valid(self, mask_ref, tile):
        """Which keys of a tile count, as booleans, or `None` for all."""
        inside = self.rows_inside(tile, self.keys)
        if mask_ref is None:
            return inside
        shape = self.tiles.shape
        index = (jnp.broadcast_to(i, shape) for i in (self.batch, self._rows(tile)))
        if inside is not None:
            inside = jnp.broadcast_to(inside, shape)
        return _load(mask_ref.at[tuple(index)], inside, 0.0) > 0

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

    def add_product(self, a, b, c):
        """`a b + c`, rounded once: XLA does not contract the two in these kernels."""
        if self.interpret:
            return a * b + c
        return triton.elementwise_inline_asm(
            "fma.rn.f32 $0, $1, $2, $3;",
            args=[jnp.broadcast_to(x, self.tiles.shape) for x in (a, b, c)],
            constraints="=f,f,f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(self.tiles.shape, jnp.float32)],
        )[0]


def _load(view, mask, other):
    """Loads float32, of whatever dtype, and `other` where the mask is false."""
    if mask is None:
        return triton.load(view).astype(jnp.float32)
    return triton.load(view, mask=mask, other=other).astype(jnp.float32)


def _over_rows(reduce, x):
    """Reduces the rows of a tile; all rows of the result are equal."""
    return jnp.broadcast_to(reduce(x, axis=0)[None], x.shape)


def _totals(tiles):
    """Sums the rows of many tiles; all rows of the results are equal.

    Together, so that threads wait for each other twice and not twice for each tile.
    """
    results = []
    for start in range(0, len(tiles), TOTALS):
        part = list(tiles[start : start + TOTALS])
        count = len(part)
        part += [jnp.zeros_like(part[0])] * (pl.next_power_of_2(count) - count)
        while len(part) > 1:
            pairs = zip(part[::2], part[1::2], strict=True)
            part = [jnp.stack(pair, axis=-1) for pair in pairs]
        part = [jnp.sum(part[0], axis=0)]
        while part[0].ndim > 1:
            halves = [jax.lax.split(x, (1, 1), axis=x.ndim - 1) for x in part]
            part = [x.reshape(x.shape[:-1]) for pair in halves for x in pair]
        results += [jnp.broadcast_to(x[None], tiles[0].shape) for x in part[:count]]
    return results


def _where(mask, x, otherwise=0.0):
    """`x` where the mask (or all, for `None`) is true."""
    if mask is None:
        return x
    return jnp.where(jnp.broadcast_to(mask, x.shape), x, otherwise)


def _forward_kernel(*refs, sizes, starts, tiles, size, exact, save, masked, interpret):
    q_ref, k_ref, v_ref = zip(refs[:3], starts)
    refs = list(refs[3:])
    mask_ref = refs.pop(0) if masked else None
    y_ref, *saved_refs = refs
    here = _Program(sizes, tiles, interpret)
    queries, keys, _ = sizes
    count, reach, scales = size
    zero = jnp.zeros(tiles.shape, jnp.float32)

    low, high, mean, key_sum = _limits(here, k_ref, v_ref, mask_ref)
    middle, half, inverse = _geometry(low, high)

    # The derivative starts at the second moment.
    powers = count + 1 if save else count

    def load_keys(tile):
        return tuple(here.load(r, tile, keys) for r in (k_ref, v_ref))

    def add_keys(tile, loaded, sums):
        (k, v), valid = loaded, here.valid(mask_ref, tile)
        t = _where(valid, (k - middle) * inverse)
        return _add_powers(
            here, sums, t, _where(valid, jnp.ones_like(t)), _where(valid, v - mean)
        )

    sums = _totals(here.loop(keys, load_keys, add_keys, (zero,) * (2 * powers)))
    m0, m1 = sums[:powers], sums[powers:]
    if save:
        for p in range(powers):
            here.store_row(saved_refs[1], 0, p, x=m0[p])
            here.store_row(saved_refs[1], 1, p, x=m1[p])
    # Without any valid key every sum is zero, and so is the output.
    empty = jnp.where(m0[0] == 0, 1.0, 0.0)
    lower = [scales[p] * m0[p] for p in range(count)]
    upper = [scales[p] * m1[p] for p in range(count)]

    def load_queries(tile):
        return here.load(q_ref, tile, queries)

    def evaluate(tile, q, carry):
        largest, cancellation = carry
        s = q * (half / reach)
        even, odd = _halves(here, lower, s)
        denominator = even + odd + empty
        factor = 1.0 / denominator
        output = sum(_halves(here, upper, s)) * factor
        here.store(y_ref, tile, queries, output + mean)
        if save:
            here.store(saved_refs[2], tile, queries, output)
            here.store(saved_refs[3], tile, queries, denominator)
        # The sum at -s: there, what alternates here has the same sign.
        ratio = (even - odd) * factor
        ratio = _where(here.rows_inside(tile, queries), ratio * ratio)
        return jnp.maximum(largest, jnp.abs(q)), cancellation + ratio

    largest, cancellation = here.loop(queries, load_queries, evaluate, (zero, zero))
    z = _over_rows(jnp.max, largest) * half
    cancellation = _over_rows(jnp.sum, cancellation) / queries
    # Comparisons that NaN fails. A NaN among the queries is one in `cancellation`.
    kept = z <= reach
    kept = jnp.logical_and(kept, cancellation <= _series.MAX_CANCELLATION**2)
    for number in (m1[0], key_sum):
        kept = jnp.logical_and(kept, jnp.abs(number) < float("inf"))
    kept = jnp.logical_and(kept, half <= MAX_HALF)
    bad = _where(here.inside, jnp.where(kept, 0.0, 1.0))
    if save:
        for i, x in enumerate((low, high, mean, bad)):
            here.store_row(saved_refs[0], i, x=x)

    if not interpret:
        # What follows overwrites what other threads may have written.
        triton.debug_barrier()

    @pl.when(jnp.sum(bad) > 0)
    def _():
        if exact:
            arguments = here, q_ref, k_ref, v_ref, mask_ref, low, high, mean
            _exact_forward(*arguments, y_ref, *saved_refs[2:])
        else:
            _poison(here, y_ref, bad)


def _limits(here, k_ref, v_ref, mask_ref):
    """Returns the smallest and largest key, the mean value and the sum of the keys."""
    masked = mask_ref is not None

    def load(tile):
        return [here.load(r, tile, here.keys) for r in (k_ref, v_ref)]

    def body(tile, loaded, carry):
        (k, v), (low, high, keys, values, count) = loaded, carry
        valid = here.valid(mask_ref, tile)
        low = jnp.minimum(low, _where(valid, k, float("inf")))
        high = jnp.maximum(high, _where(valid, k, -float("inf")))
        if masked:
            count = count + _where(valid, jnp.ones_like(k))
        return low, high, keys + k, values + v, count

    zero = jnp.zeros(here.tiles.shape, jnp.float32)
    infinity = jnp.full_like(zero, float("inf"))
    low, high, keys, values, count = pipelined(
        here.steps(here.keys),
        load,
        body,
        (infinity, -infinity, zero, zero, zero),
        together=here.tiles.group,
    )
    low, high = _over_rows(jnp.min, low), _over_rows(jnp.max, high)
    empty = low > high
    low, high = (jnp.where(empty, 0.0, x) for x in (low, high))
    keys_here = float(here.keys)
    if masked:
        keys_here = jnp.maximum(_over_rows(jnp.sum, count), 1.0)
    mean = _over_rows(jnp.sum, values) / keys_here
    mean = jnp.where(jnp.abs(mean) < float("inf"), mean, 0.0)
    return low, high, mean, _over_rows(jnp.sum, keys)


def _geometry(low, high):
    """Returns the middle of the keys, half their range and its reciprocal."""
    half = jnp.maximum(high / 2 - low / 2, 1e-20)
    return low / 2 + high / 2, half, 1.0 / half


def pipelined(number, load, body, init, together=1):
    """A loop over tiles that loads the next ones while it uses those before.

    What one round hands to the next has to arrive before the round can end. So several
    tiles at a time are waited for less.
    """
    rounds = pl.cdiv(number, together)

    def load_round(index):
        return [load(index * together + i) for i in range(together)]

    def round(index, carry):
        loaded, carry = carry
        following = load_round(jnp.minimum(index + 1, rounds - 1))
        for i, tile in enumerate(loaded):
            carry = body(index * together + i, tile, carry)
        return following, carry

    return jax.lax.fori_loop(0, rounds, round, (load_round(0), init))[1]


def _add_powers(here, sums, x, first, second):
    """Adds `x^p first` and `x^p first second` to the sums, p < half their number."""
    count = len(sums) // 2
    sums0, sums1 = [], []
    for p in range(count):
        if p > 0:
            first = first * x
        sums0.append(sums[p] + first)
        sums1.append(here.add_product(first, second, sums[count + p]))
    return (*sums0, *sums1)


def _halves(here, coefficients, x):
    """Returns the even and the odd part of a polynomial, coefficients are tiles."""
    square = x * x
    parts = []
    for part in (coefficients[0::2], coefficients[1::2]):
        result = part[-1]
        for c in reversed(part[:-1]):
            result = here.add_product(result, square, c)
        parts.append(result)
    return parts[0], x * parts[1]


def _poison(here, y_ref, bad):
    nothing = jnp.full_like(bad, float("nan"))

    def body(tile, carry):
        here.store(y_ref, tile, here.queries, nothing, mask=bad > 0)
        return carry

    jax.lax.fori_loop(0, here.steps(here.queries), body, 0)


def _exact_forward(
    here,
    q_ref,
    k_ref,
    v_ref,
    mask_ref,
    low,
    high,
    mean,
    y_ref,
    output_ref=None,
    denominator_ref=None,
):
    def body(step, carry):
        tiles = here.group(step)
        queries = [here.load(q_ref, tile, here.queries) for tile in tiles]
        references = [jnp.where(q >= 0, high, low) for q in queries]

        def part(index):
            index, kept = here.valid_row(mask_ref, index, here.keys)
            k = here.load_row(k_ref, index)
            v = _where(kept, here.load_row(v_ref, index) - mean)
            for q, reference in zip(queries, references, strict=True):
                weight = jnp.exp(_where(kept, q * (k - reference)))
                weight = _where(kept, weight)
                yield weight, weight * v

        sums = _exact_sums(here, here.keys, part)
        for tile, (denominator, output) in zip(tiles, sums, strict=True):
            denominator = jnp.where(denominator == 0, 1.0, denominator)
            output = output / denominator
            here.store(y_ref, tile, here.queries, output + mean)
            if output_ref is not None:
                here.store(output_ref, tile, here.queries, output)
                here.store(denominator_ref, tile, here.queries, denominator)
        return carry

    steps = here.steps(here.queries, here.tiles.group)
    jax.lax.fori_loop(0, steps, body, 0)


def _exact_sums(here, length, part):
    """Returns sums of `part(index)` over the indices, with Kahan's correction.

    `part` yields two numbers for each tile of a step; so the sums are pairs as well.
    """
    zero = jnp.zeros(here.tiles.shape, jnp.float32)

    def body(step, carry):
        sums = [zero] * (2 * here.tiles.group)
        for i in range(BLOCK):
            parts = [x for pair in part(step * BLOCK + i) for x in pair]
            sums = [s + p for s, p in zip(sums, parts, strict=True)]
        results = []
        for (total, correction), new in zip(carry, sums, strict=True):
            new = new - correction
            result = total + new
            correction = (result - total) - new
            # An infinite sum has none; inf - inf must not make it NaN.
            correction = jnp.where(correction == correction, correction, 0.0)
            results.append((result, correction))
        return results

    init = [(zero, zero)] * (2 * here.tiles.group)
    sums = jax.lax.fori_loop(0, pl.cdiv(length, BLOCK), body, init)
    sums = [total for total, _ in sums]
    return list(zip(sums[::2], sums[1::2], strict=True))


def _backward_kernel(*refs, sizes, starts, tiles, size, exact, masked, interpret):
    q_ref, k_ref, v_ref = zip(refs[:3], starts)
    refs = list(refs[3:])
    mask_ref = refs.pop(0) if masked else None
    g_ref, y_ref, denominator_ref, stats_ref, sums_ref, *results = refs
    # One result for each tensor, as many as there are.
    results = list(zip(results * (3 // len(results)), starts))
    here = _Program(sizes, tiles, interpret)
    low, high, mean, bad = (here.load_row(stats_ref, i) for i in range(4))
    arguments = here, q_ref, k_ref, v_ref, mask_ref, g_ref, y_ref, denominator_ref
    # Without a branch around it: sums over threads are slower in one.
    # Where channels are not computed exactly, never silently wrong.
    poison = None if exact else jnp.where(bad > 0, float("nan"), 0.0)
    _series_backward(*arguments, sums_ref, low, high, mean, poison, size, *results)
    if not exact:
        return
    if not interpret:
        # What follows overwrites what other threads may have written.
        triton.debug_barrier()

    @pl.when(jnp.sum(bad) > 0)
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
    queries, keys = here.queries, here.keys
    middle, half, inverse = _geometry(low, high)

    def load_queries(tile):
        denominator = here.load(denominator_ref, tile, queries, 1.0)
        q, g, y = (here.load(r, tile, queries) for r in (q_ref, g_ref, y_ref))
        return q, g, y, denominator

    def scale_queries(loaded):
        q, g, y, denominator = loaded
        if poison is not None:
            g = g + poison
        return q * (half / reach), g / denominator, y

    lower, upper = (
        [scales[p] * here.load_row(sums_ref, i, p + 1) for p in range(count)]
        for i in range(2)
    )

    def to_queries(tile, loaded, carry):
        s, factor, y = scale_queries(loaded)
        slope = sum(_halves(here, upper, s)) - y * sum(_halves(here, lower, s))
        here.store(to_q_ref, tile, queries, factor * half * slope)
        return carry

    here.loop(queries, load_queries, to_queries, 0)

    def add_queries(tile, loaded, sums):
        s, factor, y = scale_queries(loaded)
        return _add_powers(here, sums, s, factor, y)

    zeros = (jnp.zeros(here.tiles.shape, jnp.float32),) * (2 * count + 2)
    sums = _totals(here.loop(queries, load_queries, add_queries, zeros))
    h, hy = sums[: count + 1], sums[count + 1 :]

    def load_keys(tile):
        return tuple(here.load(r, tile, keys) for r in (k_ref, v_ref))

    def to_keys(tile, loaded, carry):
        (k, v), valid = loaded, here.valid(mask_ref, tile)
        t = _where(valid, (k - middle) * inverse)
        # Ratios of coefficients, so that three series share the same numbers.
        series = [x[count - 1] for x in (h, h[1:], hy[1:])]
        for p in range(count - 2, -1, -1):
            x = t * (scales[p + 1] / scales[p])
            series = [
                here.add_product(s, x, c[p])
                for s, c in zip(series, (h, h[1:], hy[1:]), strict=True)
            ]
        to_v, to_k, to_k_less = (scales[0] * s for s in series)
        to_k = ((v - mean) * to_k - to_k_less) * (reach * inverse)
        here.store(to_k_ref, tile, keys, _where(valid, to_k))
        here.store(to_v_ref, tile, keys, _where(valid, to_v))
        return carry

    here.loop(keys, load_keys, to_keys, 0)


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
    group = here.tiles.group

    def to_queries(step, carry):
        tiles = here.group(step)
        queries, upstreams, outputs = (
            [here.load(r, tile, here.queries) for tile in tiles]
            for r in (q_ref, g_ref, y_ref)
        )
        references = [jnp.where(q >= 0, high, low) for q in queries]

        def part(index):
            index, kept = here.valid_row(mask_ref, index, here.keys)
            k, v = here.load_row(k_ref, index), here.load_row(v_ref, index) - mean
            for q, y, reference in zip(queries, outputs, references, strict=True):
                k_less = k - reference
                weight = jnp.exp(_where(kept, q * k_less))
                # The difference first: the difference of two sums would lose digits.
                yield (_where(kept, weight * k_less * (v - y)),) * 2

        sums = _exact_sums(here, here.keys, part)
        for tile, g, (slope, _) in zip(tiles, upstreams, sums, strict=True):
            denominator = here.load(denominator_ref, tile, here.queries, 1.0)
            here.store(to_q_ref, tile, here.queries, slope * (g / denominator))
        return carry

    jax.lax.fori_loop(0, here.steps(here.queries, group), to_queries, 0)

    def to_keys(step, carry):
        tiles = here.group(step)
        loaded = [
            (
                here.load(k_ref, tile, here.keys),
                here.load(v_ref, tile, here.keys) - mean,
                here.valid(mask_ref, tile),
            )
            for tile in tiles
        ]

        def part(index):
            index, kept = here.valid_row(None, index, here.queries)
            q, g, y = (here.load_row(r, index) for r in (q_ref, g_ref, y_ref))
            factor = g / here.load_row(denominator_ref, index, other=1.0)
            reference = jnp.where(q >= 0, high, low)
            for k, v, valid in loaded:
                weight = jnp.exp(_where(valid, q * (k - reference)))
                weight = _where(kept, weight * factor)
                yield weight * q * (v - y), weight

        sums = _exact_sums(here, here.queries, part)
        for tile, (_, _, valid), (to_k, to_v) in zip(tiles, loaded, sums, strict=True):
            here.store(to_k_ref, tile, here.keys, _where(valid, to_k))
            here.store(to_v_ref, tile, here.keys, _where(valid, to_v))
        return carry

    jax.lax.fori_loop(0, here.steps(here.keys, group), to_keys, 0)
