"""The series of `ops/_series.py`, tile by tile of tokens: what suits a CPU.

XLA for CPUs makes one loop nest of each output, and no array larger than a cache should
pass between two of them. So a loop goes over tiles of tokens, and its body has few
kernels with much work: powers come from two small tables, `x^b` and `x^(W a)`, whose
products are summed by one kernel for all powers at once. Eight channels at a time, so
that what the kernel reads again and again stays in registers.
"""

from keras import ops

from tokenlearner_keras.ops._backend import loop
from tokenlearner_keras.ops._series import Frame, check_fit, finite_mean, half_range
from tokenlearner_keras.ops._streaming import key_limits

# Rows of a tile; with larger batches fewer.
ROWS = 64
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
    """Returns the rows of a tile and the number of tiles.

    Args:
        batch: int or `None`.
        length: int, or integer tensor where it is not known before the program runs.
    """
    rows = max(GROUP, ROWS // (batch or 4) // GROUP * GROUP)
    if not isinstance(length, int):
        return rows, -(-length // rows)
    count = max(1, -(-length // rows))
    # As equal as they can be, for little padding.
    rows = -(-length // (count * GROUP)) * GROUP
    return rows, count


def columns(channels):
    """Returns how many channels a kernel sums at a time, a divisor of their number."""
    if not isinstance(channels, int):
        return channels
    if channels % COLUMNS == 0:
        return COLUMNS
    return max(n for n in range(1, MAX_COLUMNS + 1) if channels % n == 0)


class Tiles:
    """Cuts tensors `(batch, tokens, d)` into tiles of tokens, padded with zeros."""

    def __init__(self, like):
        self.batch, self.length, self.channels = ops.shape(like)
        self.rows, self.count = plan(like.shape[0], self.length)
        self.columns = columns(self.channels)

    def cut(self, x):
        """Returns all tiles: `(tiles, d / columns, batch, groups, GROUP, columns)`."""
        shape = list(ops.shape(x))
        shape[1] = self.rows * self.count - self.length
        if not (isinstance(shape[1], int) and shape[1] == 0):
            x = ops.concatenate([x, ops.zeros(shape, dtype=x.dtype)], axis=1)
        groups, blocks = self.rows // GROUP, self.channels // self.columns
        shape = (self.batch, self.count, groups, GROUP, blocks, self.columns)
        return ops.transpose(ops.reshape(x, shape), (1, 4, 0, 2, 3, 5))

    def take(self, tiles, index):
        """Returns one tile, `(d / columns, batch, groups, 1, GROUP * columns)`."""
        tile = ops.slice(tiles, (index, 0, 0, 0, 0, 0), (1, *ops.shape(tiles)[1:]))
        shape = (*ops.shape(tiles)[1:-2], 1, GROUP * self.columns)
        return ops.reshape(tile, shape)

    def split(self, table):
        """Returns the rows of a table `(..., powers, GROUP * columns)`."""
        shape = (*ops.shape(table)[:-1], GROUP, self.columns)
        return ops.reshape(table, shape)


def _powers(x, count):
    """Returns `x^0, x^1, ...` for `(..., 1, n)`: `(..., count, n)`."""
    exponents = ops.arange(count)[:, None]
    result, square = None, x
    for bit in range(max(1, (count - 1).bit_length())):
        odd = ops.equal((exponents // 2**bit) % 2, 1)
        factor = ops.where(odd, square, ops.ones_like(square))
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
    """Returns weighted moments: for each list of weights both, `(count, batch, 1, d)`.

    Weighted before the last sum, so that XLA does not do it once more for each token.

    Args:
        sums: What `moments` returned.
        *weights: Lists of numbers by power.
    """
    columns, batch, _, blocks, width, size = ops.shape(sums[0])
    results = []
    for numbers in weights:
        padded = [*numbers, *[0.0] * (blocks * width - len(numbers))]
        factor = ops.convert_to_tensor(padded, sums[0].dtype)
        factor = ops.reshape(factor, (blocks, width, 1))
        for part in sums:
            part = ops.sum(part * factor, axis=2)
            part = ops.reshape(part, (columns, batch, blocks * width, size))
            part = ops.transpose(part, (2, 1, 0, 3))[: len(numbers)]
            results.append(ops.reshape(part, (len(numbers), batch, 1, columns * size)))
    return results


def moments(x, factors, count):
    """Returns the sums of `x^p y` for both `y`, as `finish_moments` takes them.

    Args:
        x: Tensor of shape `(batch, tokens, d)`.
        factors: Both `y`, of the same shape.
        count: int. Number of powers.
    """
    tiles = Tiles(x)
    cut = [tiles.cut(part) for part in (x, *factors)]
    blocks = -(-count // WIDTH)

    def rows(table, axis):
        return ops.unstack(ops.expand_dims(tiles.split(table), axis), axis=-2)

    def body(index, sums):
        x, *factors = (tiles.take(part, index) for part in cut)
        low = rows(_powers(x, WIDTH), -4)
        high = rows(_powers(_power(x, WIDTH), blocks), -3)
        results = []
        for total, factor in zip(sums, factors):
            parts = [a * b * c for a, b, c in zip(rows(factor, -3), high, low)]
            # Two chains of multiply-adds: a tree would be a third more instructions.
            results.append(total + (sum(parts[0::2]) + sum(parts[1::2])))
        return tuple(results)

    shape = (tiles.channels // tiles.columns, tiles.batch, tiles.rows // GROUP)
    zeros = ops.zeros((*shape, blocks, WIDTH, tiles.columns), x.dtype)
    return loop(tiles.count, body, (zeros, zeros))


def halves(coefficients, x):
    """Returns the even and the odd part of `sum_p coefficients[p] x^p`."""
    square, coefficients = x * x, ops.unstack(coefficients)
    even = _horner(coefficients[0::2], square)
    if len(coefficients) == 1:
        return even, ops.zeros_like(x)
    return even, x * _horner(coefficients[1::2], square)


def _horner(coefficients, x):
    result = coefficients[-1] + ops.zeros_like(x)
    for coefficient in coefficients[-2::-1]:
        result = result * x + coefficient
    return result


def evaluate(coefficients, x):
    """Returns the series `sum_p coefficients[p] x^p`."""
    return ops.add(*halves(coefficients, x))


def enter(x, channels):
    """Returns a tensor `(batch, tokens, d)` in the form of the functions below."""
    return x


leave = enter


def frame(key, value, key_mask):
    """Returns the `Frame` of keys and values; `key_mask` may be `None`."""
    if key_mask is None:
        low, high = (f(key, axis=1, keepdims=True) for f in (ops.min, ops.max))
        count = ops.shape(value)[1]
    else:
        low, high = key_limits(key, key_mask)
        count = ops.maximum(ops.sum(key_mask, axis=1, keepdims=True), 1.0)
    total = ops.sum(value, axis=1, keepdims=True)
    mean = finite_mean(total, ops.cast(count, value.dtype))
    return Frame(low / 2 + high / 2, half_range(low, high), mean)


def key_sums(key, value, key_mask, frame, size):
    """Returns the coefficients of both series, and of their derivatives.

    Args:
        key: float tensor of shape `(batch, keys, d)`, zero where masked.
        value: float tensor of the same shape, zero where masked.
        key_mask: float tensor of shape `(batch, keys, 1)`, ones and zeros, or `None`.
        frame: A `Frame`.
        size: One of `_series.sizes()`.
    """
    count, _, scales = size
    x, y = (key - frame.middle) / frame.half, value - frame.mean
    ones = ops.ones_like(y)
    if key_mask is not None:
        x, y, ones = x * key_mask, y * key_mask, ones * key_mask
    # One more than the series has terms: the derivative starts at the second.
    sums = moments(x, (ones, y), count + 1)
    lower, upper, *slopes = finish_moments(sums, scales, [0.0, *scales])
    return never_zero(lower), upper, *(x[1:] for x in slopes)


def never_zero(lower):
    """Returns the denominator's coefficients, the first one where all are zero.

    That is, without any valid key; the output is zero then.
    """
    first = ops.reshape(
        ops.arange(lower.shape[0]) == 0, (-1, *[1] * (len(lower.shape) - 1))
    )
    empty = ops.logical_and(first, lower == 0)
    return ops.where(empty, ops.ones_like(lower), lower)


def denominators(query, sums, frame, size):
    """Returns the denominator at each scaled query, and at its negative."""
    s = query * (frame[1] / size[1])
    even, odd = halves(sums[0], s)
    return even + odd, even - odd, s


def outputs(query, sums, frame, size):
    """Returns the outputs for centred values."""
    denominator, _, s = denominators(query, sums, frame, size)
    return evaluate(sums[1], s) / denominator


def fits(query, sums, frame, size):
    """Returns whether the series is exact enough, by channel, `(batch, 1, d)`."""
    denominator, opposite, s = denominators(query, sums, frame, size)
    return check_fit(opposite / denominator, s, sums[1][0])


def gradients(query, key, value, key_mask, sums, frame, output, upstream, size):
    """Returns the gradients of query, key and value; masked ones are not zeroed."""
    count, reach, scales = size
    half = frame.half
    shifted, value = (key - frame.middle) / half, value - frame.mean
    if key_mask is not None:
        shifted = shifted * key_mask
    denominator, _, s = denominators(query, sums, frame, size)
    factor = upstream / denominator
    slope = evaluate(sums[3], s) - output * evaluate(sums[2], s)
    h, _, slopes, y_slopes = finish_moments(
        moments(s, (factor, factor * output), count + 1), scales, [0.0, *scales]
    )
    slopes, y_slopes = (evaluate(x[1:], shifted) for x in (slopes, y_slopes))
    to_key = (value * slopes - y_slopes) * (reach / half)
    return factor * half * slope, to_key, evaluate(h, shifted)
