"""The moments of `ops/_series.py`, tile by tile of tokens: what suits a CPU.

XLA for CPUs makes one loop nest of each output, and no array larger than a cache should
pass between two of them. So a loop goes over tiles of tokens, and its body has few
kernels with much work: powers come from two small tables, `x^b` and `x^(W a)`, whose
products are summed by one kernel for all powers at once. Eight channels at a time, so
that what the kernel reads again and again stays in registers. Tokens are put into the
order of the tiles by chunks, which stay in a cache, too.
"""

import numpy as np
from keras import ops

from tokenlearner_keras.ops._backend import loop

# Rows of a tile; with larger batches fewer.
ROWS = 64
# The most tiles that are put in order at a time.
TILES = 8
# Rows that one kernel adds up before they reach memory.
GROUP = 16
# Powers in the first table.
WIDTH = 6
# Channels that a kernel sums before it takes the next ones: a vector of AVX, so that
# the second table's rows of a group stay in registers while the first one's go by.
COLUMNS = 8
# The most of them where that is no divisor.
MAX_COLUMNS = 64


def plan(batch, length):
    """Returns the rows of a tile, the tiles of a chunk and the number of chunks.

    Args:
        batch: int or `None`.
        length: int, or integer tensor where it is not known before the program runs.
    """
    rows = max(GROUP, ROWS // (batch or 4) // GROUP * GROUP)
    if not isinstance(length, int):
        return rows, -(-length // rows), 1
    tiles = max(1, -(-length // rows))
    chunks = -(-tiles // TILES)
    tiles = -(-tiles // chunks)
    # As equal as they can be, for little padding.
    rows = -(-length // (chunks * tiles * GROUP)) * GROUP
    return rows, tiles, chunks


def columns(channels):
    """Returns how many channels a kernel sums at a time, a divisor of their number."""
    if not isinstance(channels, int):
        return channels
    if channels % COLUMNS == 0:
        return COLUMNS
    return max(n for n in range(1, MAX_COLUMNS + 1) if channels % n == 0)


class Tiles:
    """Cuts tensors `(batch, tokens, d)` into chunks, and those into tiles of tokens."""

    def __init__(self, like):
        self.batch, self.length, self.channels = ops.shape(like)
        self.rows, self.count, self.chunks = plan(like.shape[0], self.length)
        self.columns = columns(self.channels)
        self.size = self.rows * self.count
        self.missing = self.size * self.chunks - self.length

    @property
    def is_full(self):
        """Whether the chunks are known to need no padding."""
        return isinstance(self.missing, int) and self.missing == 0

    def pad(self, x):
        """Returns a tensor with zeros behind its tokens, as many as fill the chunks."""
        if self.is_full:
            return x
        batch, _, channels = ops.shape(x)
        zeros = ops.zeros((batch, self.missing, channels), dtype=x.dtype)
        return ops.concatenate([x, zeros], axis=1)

    def chunk(self, x, index):
        """Returns one chunk of a padded tensor."""
        if self.chunks == 1:
            return x
        batch, _, channels = ops.shape(x)
        return ops.slice(x, (0, index * self.size, 0), (batch, self.size, channels))

    def without_padding(self, x, index):
        """Returns a chunk, zero where there is no token."""
        if self.is_full:
            return x
        used = index * self.size + ops.arange(self.size) < self.length
        return ops.where(used[:, None], x, ops.zeros_like(x))

    def cut(self, x):
        """Returns a chunk as `(tiles, d / columns, batch, groups, GROUP, columns)`."""
        groups, blocks = self.rows // GROUP, self.channels // self.columns
        shape = (self.batch, self.count, groups, GROUP, blocks, self.columns)
        return ops.transpose(ops.reshape(x, shape), (1, 4, 0, 2, 3, 5))

    def take(self, tiles, index):
        """Returns one tile, `(d / columns, batch, groups, 1, GROUP * columns)`."""
        tile = ops.slice(tiles, (index, 0, 0, 0, 0, 0), (1, *ops.shape(tiles)[1:]))
        shape = (*ops.shape(tiles)[1:-2], 1, GROUP * self.columns)
        return ops.reshape(tile, shape)


def _powers(x, count):
    """Returns `x^0, x^1, ...` for `(..., 1, n)`: `(..., count, n)`."""
    exponents = np.arange(count)[:, None]
    result, square, one = None, x, ops.cast(1, x.dtype)
    for bit in range(max(1, (count - 1).bit_length())):
        factor = ops.where(exponents >> bit & 1 == 1, square, one)
        result = factor if result is None else result * factor
        square = square * square
    return result


def _power(x, count):
    """Returns `x^count`, by squaring."""
    if count == 1:
        return x
    half = _power(x, count // 2)
    return half * half * x if count % 2 else half * half


def finish_moments(sums, *weights):
    """Returns weighted moments: for each list of weights both, `(powers, batch, 1, d)`.

    Weighted before the last sum, so that XLA does not do it once more for each token.

    Args:
        sums: What `moments` returned.
        *weights: Lists of numbers by power; as many as there are powers.
    """
    columns, batch, _, factors, blocks, width, size = ops.shape(sums)
    number, powers, used = len(weights), blocks * width, len(weights[0])
    table = np.zeros((number, powers))
    table[:, :used] = weights
    table = table.reshape(number, 1, 1, 1, 1, blocks, width, 1)
    sums = ops.sum(sums[None] * ops.convert_to_tensor(table, sums.dtype), axis=3)
    sums = ops.reshape(sums, (number, columns, batch, factors, powers, size))
    sums = ops.transpose(sums, (0, 3, 4, 2, 1, 5))
    shape = (number * factors, powers, batch, 1, columns * size)
    return [part[:used] for part in ops.unstack(ops.reshape(sums, shape))]


def moments(make, tensors, count):
    """Returns the sums of `x^p y` for both `y`, as `finish_moments` takes them.

    Args:
        make: Function from tokens of the tensors to `x` and a pair of `y`, all of shape
            `(batch, tokens, d)`. Called with a chunk at a time, so that what it makes
            of all of them need not go through memory.
        tensors: List of tensors `(batch, tokens, d or 1)`, the first one of d channels.
        count: int. Number of powers.
    """
    tiles = Tiles(tensors[0])
    padded = [tiles.pad(x) for x in tensors]
    blocks = -(-count // WIDTH)

    def rows(table, *sizes):
        """Returns the rows of a group; sizes are of factors, high and low powers."""
        shape = (*ops.shape(table)[:3], *sizes, GROUP, tiles.columns)
        return ops.unstack(ops.reshape(table, shape), axis=-2)

    def add_chunk(chunk, sums):
        x, factors = make(*(tiles.chunk(tensor, chunk) for tensor in padded))
        cut = [tiles.cut(tiles.without_padding(y, chunk)) for y in (x, *factors)]

        def add_tile(index, sums):
            x, *factors = (tiles.take(part, index) for part in cut)
            # One kernel for both: it costs a product a row, and saves a start.
            factors = rows(ops.stack(factors, axis=3), len(factors), 1, 1)
            high = rows(_powers(_power(x, WIDTH), blocks), 1, blocks, 1)
            low = rows(_powers(x, WIDTH), 1, 1, WIDTH)
            parts = [a * b * c for a, b, c in zip(factors, high, low)]
            # Two chains of multiply-adds: a tree would be a third more instructions.
            return (sums[0] + (sum(parts[0::2]) + sum(parts[1::2])),)

        return loop(tiles.count, add_tile, sums)

    shape = (tiles.channels // tiles.columns, tiles.batch, tiles.rows // GROUP)
    zeros = ops.zeros((*shape, 2, blocks, WIDTH, tiles.columns), padded[0].dtype)
    if tiles.chunks == 1:
        return add_chunk(0, (zeros,))[0]
    return loop(tiles.chunks, add_chunk, (zeros,))[0]


def enter(x, channels):
    """Returns a tensor `(batch, tokens, d)`, as `weighted_moments` takes it."""
    return x


leave = enter


def weighted_moments(make, tensors, weights):
    """Returns the weighted sums of `x^p y` for both `y`, and those of `x^(p + 1) y`.

    Args:
        make: Function from tokens of the tensors to `x` and a pair of `y`, all of shape
            `(batch, tokens, d)`; a `y` of `None` is one.
        tensors: List of tensors `(batch, tokens, d or 1)`, the first one of d channels.
        weights: Numbers, one for each p.

    Returns:
        Four tensors `(weights, batch, 1, d)`.
    """

    def filled(*tensors):
        x, factors = make(*tensors)
        return x, [ops.ones_like(x) if y is None else y for y in factors]

    sums = moments(filled, tensors, len(weights) + 1)
    *lower, first, second = finish_moments(sums, [*weights, 0.0], [0.0, *weights])
    return *(part[:-1] for part in lower), first[1:], second[1:]
