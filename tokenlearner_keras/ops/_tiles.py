"""The series of `ops/_series.py`, tile by tile of tokens: what suits a CPU.

XLA for CPUs makes one loop nest of each output, and no array larger than a cache should
pass between two of them. So a loop goes over tiles of tokens, and its body has few
kernels with much work: powers come from two small tables, `x^b` and `x^(W a)`, whose
products are summed by one kernel for all powers at once.
"""

from keras import ops

from tokenlearner_keras.ops._backend import loop

# Rows of a tile; with larger batches fewer.
ROWS = 64
# Rows that one kernel adds up before they reach memory.
GROUP = 16
# Powers in the first table.
WIDTH = 7


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


class Tiles:
    """Cuts tensors `(batch, tokens, d)` into tiles, padded with zeros."""

    def __init__(self, like):
        batch, self.length = like.shape[0], ops.shape(like)[1]
        self.rows, self.count = plan(batch, self.length)
        self.missing = self.rows * self.count - self.length

    def pad(self, x):
        if isinstance(self.missing, int) and self.missing == 0:
            return x
        shape = list(ops.shape(x))
        shape[1] = self.missing
        return ops.concatenate([x, ops.zeros(shape, dtype=x.dtype)], axis=1)

    def take(self, x, index):
        """Returns one tile of a padded tensor `(..., tokens, d)`."""
        if isinstance(self.count, int) and self.count == 1:
            return x
        shape, start = list(ops.shape(x)), [0] * len(x.shape)
        shape[-2], start[-2] = self.rows, index * self.rows
        return ops.slice(x, start, shape)


def tree_sum(parts):
    """Returns the sum of a list, added up pairwise."""
    parts = list(parts)
    while len(parts) > 1:
        last = parts[-1:] if len(parts) % 2 else []
        parts = [a + b for a, b in zip(parts[0::2], parts[1::2])] + last
    return parts[0]


def _powers(x, count):
    """Returns `x^0, x^1, ...`, stacked in front."""
    exponents = ops.reshape(ops.arange(count), (count, 1, 1, 1))
    result, square = None, x[None]
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
    blocks, width, batch, rows, channels = ops.shape(sums[0])
    grouped = (batch, GROUP, rows, channels)
    high = _powers(_power(x, width), blocks)
    high = ops.reshape(high, (blocks, 1, *grouped))
    results = []
    for total, factor in zip(sums, factors):
        low = _powers(x, width)
        low = low if factor is None else low * factor[None]
        low = ops.reshape(low, (1, width, *grouped))
        parts = (low[:, :, :, g] * high[:, :, :, g] for g in range(GROUP))
        results.append(total + tree_sum(parts))
    return tuple(results)


def finish_moments(sums, *weights):
    """Returns weighted moments: for each list of weights both, `(count, batch, 1, d)`.

    Weighted before the last sum, so that XLA does not do it once more for each token.

    Args:
        sums: What `add_moments` returned.
        *weights: Lists of numbers by power.
    """
    blocks, width, batch, _, channels = ops.shape(sums[0])
    results = []
    for numbers in weights:
        padded = [*numbers, *[0.0] * (blocks * width - len(numbers))]
        factor = ops.convert_to_tensor(padded, sums[0].dtype)
        factor = ops.reshape(factor, (blocks, width, 1, 1, 1))
        for part in sums:
            part = ops.sum(part * factor, axis=3, keepdims=True)
            shape = (blocks * width, batch, 1, channels)
            results.append(ops.reshape(part, shape)[: len(numbers)])
    return results


def evaluate(coefficients, x):
    """Returns the series `sum_p coefficients[p] x^p` by Horner's rule."""
    count = coefficients.shape[0]
    result = coefficients[count - 1] + ops.zeros_like(x)
    for term in range(count - 2, -1, -1):
        result = result * x + coefficients[term]
    return result


def _moments(x, factors, count):
    """Returns the sums of `x^p factors[i]`, as `finish_moments` takes them."""
    tiles = Tiles(x)
    if not (isinstance(tiles.missing, int) and tiles.missing == 0):
        factors = [ops.ones_like(x) if f is None else f for f in factors]
    x = tiles.pad(x)
    factors = [None if f is None else tiles.pad(f) for f in factors]

    def body(index, sums):
        parts = [None if f is None else tiles.take(f, index) for f in factors]
        return add_moments(sums, tiles.take(x, index), parts)

    batch, _, channels = ops.shape(x)
    shape = (-(-count // WIDTH), WIDTH, batch, tiles.rows // GROUP, channels)
    zeros = ops.zeros(shape, x.dtype)
    return loop(tiles.count, body, (zeros,) * len(factors))


def forward(query, shifted, value, key_mask, half, size):
    """Returns outputs, squared cancellations and residuals, as `_series.forward`.

    `key_mask` may be `None` for ones.
    """
    count, reach, scales, _ = size
    # One more than the series has terms: the derivative starts at the second.
    sums = _moments(shifted, (key_mask, value), count + 1)
    lower, upper, lower_slope, upper_slope = finish_moments(
        sums, scales, [0.0, *scales]
    )
    s = query * (half / reach)
    square = s * s
    # Without any valid key every sum is zero, and so is the output.
    even = evaluate(lower[0::2], square) + ops.cast(lower[0] == 0, query.dtype)
    odd = s * evaluate(lower[1::2], square) if count > 1 else ops.zeros_like(s)
    denominator = even + odd
    output = evaluate(upper, s) / denominator
    # The sum at -s: there, what alternates here has the same sign.
    ratio = (even - odd) / denominator
    # A product with ones: XLA for CPUs makes more of it than of a sum over rows.
    weights = ops.ones_like(query[:, :, :1]) / ops.cast(
        ops.shape(query)[1], query.dtype
    )
    cancellation = ops.matmul(ops.transpose(weights, (0, 2, 1)), ratio * ratio)
    residuals = denominator, upper[0], lower_slope[1:], upper_slope[1:]
    return output, cancellation, residuals


def backward(query, shifted, value, residuals, output, upstream, half, size):
    """Returns the gradients of query, key and value, as `_series.backward`."""
    count, reach, scales, _ = size
    denominator, _, lower, upper = residuals
    s = query * (half / reach)
    factor = upstream / denominator
    slope = evaluate(upper, s) - output * evaluate(lower, s)
    sums = _moments(s, (factor, factor * output), count + 1)
    h, _, slopes, y_slopes = finish_moments(sums, scales, [0.0, *scales])
    slopes, y_slopes = (evaluate(x[1:], shifted) for x in (slopes, y_slopes))
    to_key = (value * slopes - y_slopes) * (reach / half)
    return factor * half * slope, to_key, evaluate(h, shifted)
