"""The moments of the linear-time method as one GPU kernel, for the JAX backend."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

ROWS, COLUMNS, STEPS = 8, 16, 16


def supported(x) -> bool:
    """Whether the kernel can run on tensors like `x` here."""
    return jax.default_backend() == "gpu" and x.dtype == jnp.float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def moments(x, first, second, count, interpret=False):
    """Returns `sum x^p first` and `sum x^p second` over axis 1, p < `count`.

    Args:
        x: float32 array of shape `(batch, tokens, channels)`.
        first: float32 array with the shape of `x`.
        second: float32 array with the shape of `x`.
        count: int. Number of powers.
        interpret: bool. Whether to run without a GPU, for tests.

    Returns:
        Two arrays of shape `(batch, count, channels)`.
    """
    batch, tokens, channels = x.shape
    rows = ROWS * STEPS
    padding = ((0, 0), (0, -tokens % rows), (0, -channels % COLUMNS))
    if padding[1][1] or padding[2][1]:
        x, first, second = (jnp.pad(a, padding) for a in (x, first, second))
    grid = (batch, x.shape[1] // rows, x.shape[2] // COLUMNS)
    shape = jax.ShapeDtypeStruct((batch, grid[1], count, x.shape[2]), x.dtype)
    sums = pl.pallas_call(
        functools.partial(_kernel, count=count),
        out_shape=(shape, shape),
        grid=grid,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="vector_attention_moments",
    )(x, first, second)
    return tuple(jnp.sum(s, axis=1)[:, :, :channels] for s in sums)


def _kernel(x_ref, first_ref, second_ref, out0_ref, out1_ref, *, count):
    b, part, column = (pl.program_id(axis) for axis in range(3))
    columns = pl.ds(column * COLUMNS, COLUMNS)

    def body(step, sums):
        rows = pl.ds((part * STEPS + step) * ROWS, ROWS)
        x = x_ref[b, rows, columns]
        f, g = first_ref[b, rows, columns], second_ref[b, rows, columns]
        result = []
        # Every thread adds up its own rows: no exchange until the end.
        for p in range(count):
            if p > 0:
                f, g = f * x, g * x
            result += [sums[2 * p] + f, sums[2 * p + 1] + g]
        return tuple(result)

    zeros = jnp.zeros((ROWS, COLUMNS), x_ref.dtype)
    sums = jax.lax.fori_loop(0, STEPS, body, (zeros,) * (2 * count))
    for p in range(count):
        out0_ref[b, part, p, columns] = jnp.sum(sums[2 * p], axis=0)
        out1_ref[b, part, p, columns] = jnp.sum(sums[2 * p + 1], axis=0)


def _forward(x, first, second, count, interpret):
    return moments(x, first, second, count, interpret), (x, first, second)


def _backward(count, interpret, saved, upstream):
    x, first, second = saved

    def polynomial(coefficients):
        result = jnp.zeros_like(x)
        for c in reversed(coefficients):
            result = result * x + c
        return result

    to_x, to_values = 0.0, []
    for values, sums in zip((first, second), upstream):
        c = [sums[:, p : p + 1] for p in range(count)]
        to_values.append(polynomial(c))
        to_x = to_x + values * polynomial([p * c[p] for p in range(1, count)])
    return (to_x, *to_values)


moments.defvjp(_forward, _backward)
