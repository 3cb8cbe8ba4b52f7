"""The series of `ops/_series.py`, tile by tile of tokens: what suits a CPU.

XLA for CPUs makes one loop nest of each output, and no array larger than a cache should
pass between two of them. So a loop goes over tiles of tokens, and its body has few
kernels with much work: powers come from two small tables, `x^b` and `x^(W a)`, whose
products are summed by one kernel for all powers at once. Some channels at a time, so
that what the kernel reads again and again stays in the cache next to the core.
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
# Channels that a kernel sums before it takes the next ones, at most.
COLUMNS = 64
# Operands of one kernel that reduces rows.
FOLD = 32


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
    fitting = [n for n in range(1, COLUMNS + 1) if channels % n == 0]
    # Whole vectors, if possible.
    return max(fitting, key=lambda n: (n % 8 == 0, n))


class Tiles:
    """Cuts tensors `(batch, tokens, d)` into tiles, padded with zeros.

    A tile has shape `(d / columns, batch, rows / GROUP, 1, GROUP, columns)`, where the
    axis of one is for powers.
    """

    def __init__(self, like):
        self.batch, self.length, self.channels = ops.shape(like)
        self.rows, self.count = plan(like.shape[0], self.length)
        self.missing = self.rows * self.count - self.length
        self.columns = columns(self.channels)

    @property
    def whole(self):
        """Whether no tile needs padding."""
        return isinstance(self.missing, int) and self.missing == 0

    def pad(self, x):
        if self.whole:
            return x
        shape = list(ops.shape(x))
        shape[1] = self.missing
        return ops.concatenate([x, ops.zeros(shape, dtype=x.dtype)], axis=1)

    def take(self, x, index):
        """Returns one tile of a padded tensor."""
        if not (isinstance(self.count, int) and self.count == 1):
            shape = (self.batch, self.rows, self.channels)
            x = ops.slice(x, (0, index * self.rows, 0), shape)
        return self._blocks(x, self.rows // GROUP, GROUP)

    def row(self, x):
        """Returns `(batch, 1, d)` in the form that goes with tiles."""
        return self._blocks(x, 1, 1)

    def _blocks(self, x, groups, rows):
        blocks = self.channels // self.columns
        x = ops.reshape(x, (self.batch, groups, rows, blocks, self.columns))
        return ops.transpose(x, (3, 0, 1, 2, 4))[:, :, :, None]


def tree(combine, parts):
    """Returns a list combined pairwise."""
    parts = list(parts)
    while len(parts) > 1:
        last = parts[-1:] if len(parts) % 2 else []
        parts = [combine(a, b) for a, b in zip(parts[0::2], parts[1::2])] + last
    return parts[0]


def fold(x, combine, reduce):
    """Returns `reduce(x, axis=-2, keepdims=True)`, where `combine` does it for two.

    XLA's own reduction over rows takes several times as long, if they are many. The
    last few rows are left to it: XLA would do again for every token what comes last,
    if that were no reduction.
    """
    rows, channels = x.shape[-2:]
    while rows is not None and channels is not None and rows > FOLD:
        number = max(n for n in range(1, FOLD + 1) if rows % n == 0)
        if number < 8:
            break
        rows //= number
        x = ops.reshape(x, (*ops.shape(x)[:-2], number, rows, channels))
        x = tree(combine, ops.unstack(x, axis=-3))
    return reduce(x, axis=-2, keepdims=True)


def _powers(x, count):
    """Returns `x^0, x^1, ...`, along the axis for powers."""
    exponents = ops.reshape(ops.arange(count), (count, 1, 1))
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


def add_moments(sums, x, factors):
    """Adds `x^p factors[i]` of one tile to `sums[i]`, for every power p and i.

    A factor `None` is one.
    """
    blocks, width = sums[0].shape[3:5]
    high = _powers(_power(x, width), blocks)[:, :, :, :, None]
    results = []
    for total, factor in zip(sums, factors):
        low = _powers(x, width)
        low = (low if factor is None else low * factor)[:, :, :, None]
        parts = map(ops.multiply, *(ops.unstack(x, axis=-2) for x in (low, high)))
        results.append(total + tree(ops.add, parts))
    return tuple(results)


def finish_moments(sums, *weights):
    """Returns weighted moments: for each list of weights both, `(count, batch, 1, d)`.

    Weighted before the last sum, so that XLA does not do it once more for each token.

    Args:
        sums: What `add_moments` returned.
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


def moments(tensors, prepare, count, whole=True):
    """Returns the sums of `x^p y` for both `y`, as `finish_moments` takes them.

    Args:
        tensors: Tuple of tensors `(batch, tokens, d)`.
        prepare: Function of the tensors, and of a function that brings `(batch, 1, d)`
            into their form, to `x`, and a tuple of two `y`, of which `None` is one.
        count: int. Number of powers.
        whole: bool. Whether `prepare` may be called with tiles.
    """
    tiles = Tiles(tensors[0])
    if not (whole and tiles.whole):
        # Where there is padding, every `y` must be zero.
        x, factors = prepare(tensors, lambda x: x)
        factors = (ops.ones_like(x) if y is None else y for y in factors)
        tensors = tuple(
            tiles.pad(x + ops.zeros_like(tensors[0])) for x in (x, *factors)
        )

        def prepare(tensors, _):
            return tensors[0], tensors[1:]

    def body(index, sums):
        cut = tuple(tiles.take(x, index) for x in tensors)
        return add_moments(sums, *prepare(cut, tiles.row))

    blocks = tiles.channels // tiles.columns
    shape = (blocks, tiles.batch, tiles.rows // GROUP)
    shape = (*shape, -(-count // WIDTH), WIDTH, tiles.columns)
    zeros = ops.zeros(shape, tensors[0].dtype)
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
        signs = ops.reshape(ops.convert_to_tensor([1.0, -1.0], key.dtype), (2, 1, 1, 1))
        limits = fold(key * signs, ops.maximum, ops.max)
        low, high = -limits[1], limits[0]
        total, count = fold(value, ops.add, ops.sum), ops.shape(value)[1]
    else:
        low, high = key_limits(key, key_mask)
        total = ops.sum(value, axis=1, keepdims=True)
        count = ops.maximum(ops.sum(key_mask, axis=1, keepdims=True), 1.0)
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

    def prepare(tensors, row):
        middle, half, mean = map(row, frame)
        x, y = (tensors[0] - middle) / half, tensors[1] - mean
        if key_mask is None:
            return x, (None, y)
        return x * key_mask, (key_mask, y * key_mask)

    # One more than the series has terms: the derivative starts at the second.
    sums = moments((key, value), prepare, count + 1, whole=key_mask is None)
    lower, upper, *slopes = finish_moments(sums, scales, [0.0, *scales])
    return lower, upper, *(x[1:] for x in slopes)


def denominators(query, sums, frame, size):
    """Returns the denominator at each scaled query, and at its negative."""
    lower, s = sums[0], query * (frame[1] / size[1])
    even, odd = halves(lower, s)
    # Without any valid key every sum is zero, and so is the output.
    even = even + ops.cast(lower[0] == 0, query.dtype)
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

    def prepare(tensors, row):
        s, factor, output = tensors
        return s * row(half / reach), (factor, factor * output)

    h, _, slopes, y_slopes = finish_moments(
        moments((query, factor, output), prepare, count + 1), scales, [0.0, *scales]
    )
    slopes, y_slopes = (evaluate(x[1:], shifted) for x in (slopes, y_slopes))
    to_key = (value * slopes - y_slopes) * (reach / half)
    return factor * half * slope, to_key, evaluate(h, shifted)
