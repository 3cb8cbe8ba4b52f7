"""Vector attention with the extra projection of the paper, and its weights."""

from keras import ops

from tokenlearner_keras.ops._backend import loop, with_gradient
from tokenlearner_keras.ops.vector_attention import dropout_factors, pair_mask_of

BLOCK = 4


def gamma_attention(
    query, key, value, kernel, mask, scale, dropout, seed=None, dense=False
):
    """Returns the outputs and, if `dense`, the weights (else `None`).

    Args:
        query: Tensor of shape `(batch, queries, dim)`.
        key: Tensor of shape `(batch, keys, dim)`.
        value: Tensor of shape `(batch, keys, value_dim)`.
        kernel: Tensor of shape `(dim, value_dim)`, or `None` for no projection.
        mask: As in `vector_attention`.
        scale: As in `vector_attention`.
        dropout: As in `vector_attention`.
        seed: As in `vector_attention`.
        dense: bool. Whether the whole pair tensor is formed, else a few queries at a
            time.
    """
    dtype = value.dtype
    inner = "float64" if str(dtype).endswith("float64") else "float32"
    query, key, value = (ops.cast(x, inner) for x in (query, key, value))
    query = query * ops.cast(scale, inner)
    kernel = None if kernel is None else ops.cast(kernel, inner)
    pairs = pair_mask_of(mask, query, key)
    if mask is not None:
        used = ops.any(pairs, axis=1)[:, :, None]
        key = ops.where(used, key, ops.zeros_like(key))
        value = ops.where(used, value, ops.zeros_like(value))
    if dense:
        factors = dropout_factors(query, key, value, dropout, seed)
        indices = ops.arange(ops.shape(query)[1])
        output, weights = _block(query, key, value, kernel, pairs, factors, indices)[:2]
        return ops.cast(output, dtype), ops.cast(weights, dtype)
    tensors = [query, key, value, kernel, ops.cast(pairs, inner)]
    if dropout:
        tensors.append(ops.cast(ops.convert_to_tensor(seed), "int32"))
    output = with_gradient(*_blocked(dropout))(*tensors)
    return ops.cast(output, dtype), None


def _block(query, key, value, kernel, pairs, factors, indices):
    """The definition, for some of the queries."""
    products = query[:, :, None] * key[:, None]
    logits = products if kernel is None else ops.matmul(products, kernel)
    mask = pairs[..., None]
    some = ops.any(mask, axis=2, keepdims=True)
    logits = ops.where(mask, logits, ops.full_like(logits, float("-inf")))
    logits = ops.where(some, logits, ops.zeros_like(logits))
    weights = ops.softmax(logits, axis=2)
    weights = ops.where(mask, weights, ops.zeros_like(weights))
    dropped = weights
    if factors is not None:
        dropped = weights * factors(indices, ops.arange(ops.shape(key)[1]))
    output = ops.sum(dropped * value[:, None], axis=2)
    return output, dropped, weights, products


def _blocked(dropout):
    """Forward and backward function, `BLOCK` queries at a time."""

    def prepare(args):
        query, key, value, kernel, pairs, *seed = args
        factors = dropout_factors(query, key, value, dropout, *seed)
        count = -(-query.shape[1] // BLOCK)
        missing = ((0, 0), (0, count * BLOCK - query.shape[1]), (0, 0))

        def block(x, index):
            x = ops.pad(x, missing)
            shape = list(ops.shape(x))
            shape[1] = BLOCK
            return ops.slice(x, (0, index * BLOCK, 0), shape)

        def run(index):
            indices = index * BLOCK + ops.arange(BLOCK)
            mask = block(pairs, index) > 0
            return _block(
                block(query, index), key, value, kernel, mask, factors, indices
            )

        def put(whole, part, index):
            # Adds a block of rows to a tensor; rows past its end are dropped.
            rows = ops.arange(whole.shape[1])[:, None] - index * BLOCK
            here = ops.cast(rows == ops.arange(BLOCK), whole.dtype)
            return whole + ops.einsum("nr,brc->bnc", here, part)

        return count, block, run, put

    def forward(*args):
        query, value = args[0], args[2]
        count, _, run, put = prepare(args)
        shape = (ops.shape(query)[0], query.shape[1], value.shape[2])

        def body(index, carry):
            return (put(carry[0], run(index)[0], index),)

        return loop(count, body, (ops.zeros(shape, query.dtype),))[0], ()

    def backward(args, residuals, upstream):
        query, key, value, kernel, *rest = args
        count, block, run, put = prepare(args)

        def body(index, carry):
            to_query, to_key, to_value, to_kernel = carry
            output, dropped, weights, products = run(index)
            g = block(upstream, index)[:, :, None]
            to_weights = g * value[:, None] * dropped
            to_logits = to_weights - weights * (g * output[:, :, None])
            to_products = ops.matmul(to_logits, ops.transpose(kernel))
            q = block(query, index)[:, :, None]
            return (
                put(to_query, ops.sum(to_products * key[:, None], axis=2), index),
                to_key + ops.sum(to_products * q, axis=1),
                to_value + ops.sum(dropped * g, axis=1),
                to_kernel + ops.einsum("bijd,bije->de", products, to_logits),
            )

        zeros = tuple(ops.zeros_like(x) for x in (query, key, value, kernel))
        return (*loop(count, body, zeros), *(None for _ in rest))

    return forward, backward
