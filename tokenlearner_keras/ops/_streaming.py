"""Vector attention block by block: exact, and nothing of size queries times keys."""

from keras import ops

from tokenlearner_keras.ops._backend import loop

BLOCK = 4


def forward(query, key, value, key_mask, pair_mask=None, drop=None, slopes=True):
    """Returns the outputs, the denominators and the derivatives by the query.

    Without `slopes` the derivatives are `None`: half the work and memory.

    Args:
        query: float tensor of shape `(batch, queries, d)`, scaled.
        key: float tensor of shape `(batch, keys, d)`, zero where masked.
        value: float tensor of shape `(batch, keys, d)`, zero where masked.
        key_mask: float tensor of shape `(batch, keys, 1)`, ones and zeros.
        pair_mask: float tensor of shape `(batch, queries, keys)` or `None`.
        drop: Function `(query_indices, key_indices)` to the factors of the dropout,
            `(batch, queries, keys, d)`, or `None`.
    """
    count = -(-ops.shape(key)[1] // BLOCK)
    low, high = key_limits(key, key_mask)
    reference = references(query, low, high)[:, :, None]
    q = query[:, :, None]
    padded_key, padded_value, padded_mask = (
        _pad(x, count, axis=1) for x in (key, value, key_mask)
    )
    padded_pairs = None if pair_mask is None else _pad(pair_mask, count, axis=2)

    def body(index, sums):
        start = index * BLOCK
        k = _block(padded_key, start, 1)[:, None] - reference
        v = _block(padded_value, start, 1)[:, None]
        mask = _block(padded_mask, start, 1)[:, None]
        if padded_pairs is not None:
            mask = mask * _block(padded_pairs, start, 2)[..., None]
        weight = _masked(ops.exp(_masked(q * k, mask)), mask)
        k = _masked(k, mask)
        dropped = weight
        if drop is not None:
            dropped = weight * drop(
                ops.arange(ops.shape(query)[1]), start + ops.arange(BLOCK)
            )
        parts = (weight, dropped * v)
        if slopes:
            parts = (*parts, weight * k, dropped * v * k)
        return _add(sums, (ops.sum(p, axis=2) for p in parts))

    # Zeros that inherit every axis, those of unknown size too, and no NaN.
    zeros = ops.zeros_like(query)
    number = 4 if slopes else 2
    return _finish(*loop(count, body, (zeros,) * (2 * number))[:number])


def _finish(weights, weighted_values, weighted_keys=None, weighted_products=None):
    """Returns outputs, denominators and slopes, zero where there is no key."""
    empty = weights == 0
    denominator = ops.where(empty, ops.ones_like(weights), weights)
    output = weighted_values / denominator
    if weighted_keys is None:
        return output, denominator, None
    slope = (weighted_products - output * weighted_keys) / denominator
    return output, denominator, slope


def backward(query, key, value, key_mask, output, factor, pair_mask=None, drop=None):
    """Returns the gradients of key and value.

    Args:
        query: As in `forward`.
        key: As in `forward`.
        value: As in `forward`.
        key_mask: As in `forward`.
        output: What `forward` returned.
        factor: The upstream gradient divided by the denominators.
        pair_mask: As in `forward`.
        drop: As in `forward`.
    """
    count = -(-ops.shape(query)[1] // BLOCK)
    low, high = key_limits(key, key_mask)
    reference = references(query, low, high)
    padded = [_pad(x, count, axis=1) for x in (query, reference, factor, output)]
    padded_pairs = None if pair_mask is None else _pad(pair_mask, count, axis=1)
    k, v, mask = key[:, None], value[:, None], key_mask[:, None]

    def body(index, sums):
        start = index * BLOCK
        q, c, h, y = (_block(x, start, 1)[:, :, None] for x in padded)
        block_mask = mask
        if padded_pairs is not None:
            block_mask = mask * _block(padded_pairs, start, 1)[..., None]
        weight = _masked(ops.exp(_masked(q * (k - c), block_mask)), block_mask) * h
        dropped, kept_value = weight, v
        if drop is not None:
            factors = drop(start + ops.arange(BLOCK), ops.arange(ops.shape(key)[1]))
            dropped, kept_value = weight * factors, v * factors
        # The difference first: the difference of two sums would lose digits.
        parts = (weight * q * (kept_value - y), dropped)
        return _add(sums, (ops.sum(p, axis=1) for p in parts))

    zeros = ops.zeros_like(key)
    return loop(count, body, (zeros,) * 4)[:2]


def key_limits(key, key_mask):
    """Returns the smallest and the largest valid key of axis 1; zeros without any."""
    infinity = ops.full_like(key, float("inf"))
    low = ops.min(ops.where(key_mask > 0, key, infinity), axis=1, keepdims=True)
    high = ops.max(ops.where(key_mask > 0, key, -infinity), axis=1, keepdims=True)
    empty = low > high
    return tuple(ops.where(empty, ops.zeros_like(x), x) for x in (low, high))


def references(query, low, high):
    """Returns for each query the key whose logit is the largest."""
    return ops.where(query >= 0, high, low)


def _add(carry, parts):
    """Adds to sums with Kahan's correction: there may be thousands of blocks."""
    half = len(carry) // 2
    sums, corrections = [], []
    for total, correction, part in zip(carry[:half], carry[half:], parts):
        part = part - correction
        result = total + part
        correction = (result - total) - part
        # An infinite sum has none; inf - inf must not make it NaN.
        correction = ops.where(ops.isnan(correction), ops.zeros_like(part), correction)
        corrections.append(correction)
        sums.append(result)
    return (*sums, *corrections)


def _masked(x, mask):
    return ops.where(mask > 0, x, ops.zeros_like(x))


def _pad(x, count, axis):
    """Pads an axis with zeros up to `count` blocks."""
    shape = list(ops.shape(x))
    missing = count * BLOCK - shape[axis]
    if isinstance(missing, int) and missing == 0:
        return x
    shape[axis] = missing
    return ops.concatenate([x, ops.zeros(shape, dtype=x.dtype)], axis=axis)


def _block(x, start, axis):
    starts, shape = [0] * len(x.shape), list(ops.shape(x))
    starts[axis], shape[axis] = start, BLOCK
    return ops.slice(x, starts, shape)
