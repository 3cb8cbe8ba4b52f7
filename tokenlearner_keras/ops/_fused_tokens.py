"""A TokenLearner with one convolution in one GPU kernel a direction (JAX, Triton).

Each program has one frame, of which all positions fit in a block; channels go by in
steps. Forward, a matrix product gives what each tap of the convolution adds at each
position; shifts of these sums are logits, and one more product pools the frame. So it
is read once from memory, and once more from a cache. Backward the same the other way
round: of the size of the input, only its gradient is stored.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from tokenlearner_keras.ops import _fused
from tokenlearner_keras.ops._batch_parallel import batch_parallel
from tokenlearner_keras.ops._kernels import with_kernels
from tokenlearner_keras.ops._taps import sum_taps


class Tiles(NamedTuple):
    """Channels of a step and warps of a program."""

    step: int = 64
    warps: int = 4


TILES = Tiles()
SUMS = Tiles(512, 8)
# Positions of a frame, and taps times tokens, whose block fits in registers.
MAX_POSITIONS = 64
MAX_TAPS = 128


class Shape(NamedTuple):
    """Sizes of a frame, of the convolution, and what tokens are divided by."""

    height: int
    width: int
    channels: int
    kernel: int
    tokens: int
    divisor: float

    @property
    def positions(self):
        return self.height * self.width

    @property
    def taps(self):
        return self.kernel**2 * self.tokens


def tokens(x, kernel, height, width, divisor):
    """Returns the tokens of frames, or `None` where there is no kernel for them.

    Args:
        x: Array of shape `(frames, height * width, channels)`, of half precision.
        kernel: Array of shape `(size, size, channels, tokens)`, of the same dtype.
        height: int.
        width: int.
        divisor: float. What the sum over the positions is divided by.

    Returns:
        Array `(frames, tokens, channels)`: equation 1 with sigmoid maps.
    """
    size, _, channels, number = kernel.shape
    shape = Shape(height, width, channels, size, number, divisor)
    mode = _fused.mode("float32")
    if (
        mode is None
        or not _is_half(x.dtype)
        or shape.positions > MAX_POSITIONS
        or shape.taps > MAX_TAPS
    ):
        return None
    kernel = jnp.transpose(kernel, (2, 0, 1, 3)).reshape(channels, -1)
    return _function(shape, mode == "interpret")(x, kernel)


def add_to_positions(x, vectors):
    """Adds a vector to each position of a frame; `None` where there is no kernel.

    The kernel is that of the gradient, a sum over the positions.

    Args:
        x: Array of frames, one after the other, of half precision; channels last.
        vectors: Array with the channels of each frame, of the same dtype.
    """
    mode = _fused.mode("float32")
    if mode is None or not _is_half(x.dtype) or x.dtype != vectors.dtype:
        return None
    vectors = vectors.reshape(-1, vectors.shape[-1])
    frames = x.reshape(vectors.shape[0], -1, vectors.shape[1])
    if frames.shape[1] > MAX_POSITIONS:
        return None
    return _add(frames.shape[1], mode == "interpret")(frames, vectors).reshape(x.shape)


@functools.cache
def _add(positions, interpret):
    @jax.custom_vjp
    def sums(x):
        return _sums(x, interpret)

    sums.defvjp(
        lambda x: (sums(x), None),
        lambda _, upstream: (jnp.repeat(upstream[:, None], positions, axis=1),),
    )

    @jax.custom_vjp
    def add(x, vectors):
        return x + vectors[:, None]

    add.defvjp(
        lambda x, vectors: (add(x, vectors), None),
        lambda _, upstream: (upstream, sums(upstream)),
    )
    return add


def _sums(x, interpret):
    _, positions, channels = x.shape
    step = min(SUMS.step, _block(channels))

    def kernel(x_ref, y_ref):
        here = _Block(interpret)
        columns = (pl.program_id(1) * step, step)
        block = here.load(x_ref, (0, _block(positions)), columns)
        total = jnp.sum(block.astype(jnp.float32), axis=0)[None]
        here.store(y_ref, (0, 1), columns, total)

    def run(x):
        frames = x.shape[0]
        results = pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((frames, 1, channels), x.dtype),
            grid=(frames, pl.cdiv(channels, step)),
            compiler_params=triton.CompilerParams(num_warps=SUMS.warps),
            interpret=interpret,
            name="sum_of_positions",
        )(x)
        return (results,)

    return batch_parallel(run)(x)[0][:, 0]


@functools.cache
def _function(shape, interpret):
    """Returns the function of `x` and the kernel, `(channels, taps)`."""

    def forward(args, _, save):
        return _run("forward", shape, interpret, *args)[:2]

    def backward(args, _, maps, upstream):
        x, kernel = args
        to_x, to_taps, _ = _run("backward", shape, interpret, *args, *maps, upstream)
        to_kernel = jnp.einsum(
            "npc,npt->ct", x, to_taps, preferred_element_type=jnp.float32
        )
        return to_x, to_kernel.astype(kernel.dtype)

    function = with_kernels(
        forward, backward, lambda args, _: _plain(*args, shape=shape)
    )
    return lambda *args: function(args, None)


def _plain(x, kernel, shape):
    """The same by array operations."""
    taps = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
    taps = taps.reshape(-1, shape.height, shape.width, shape.taps)
    logits = sum_taps(taps, shape.kernel, shape.tokens, "float32")
    maps = jax.nn.sigmoid(logits).reshape(-1, shape.positions, shape.tokens)
    weights = (maps / shape.divisor).astype(x.dtype)
    return jnp.einsum("nps,npc->nsc", weights, x)


def _run(direction, shape, interpret, x, kernel, *rest):
    positions, taps = shape.positions, shape.taps
    # The last result is memory by which threads exchange numbers.
    results = {
        "forward": [
            ((shape.tokens, shape.channels), x.dtype),
            ((positions, shape.tokens), jnp.float32),
            ((positions, taps), jnp.float32),
        ],
        "backward": [
            (x.shape[1:], x.dtype),
            ((positions, taps), x.dtype),
            ((positions, shape.tokens), jnp.float32),
        ],
    }[direction]
    body = {"forward": _forward_kernel, "backward": _backward_kernel}[direction]

    def run(kernel, *arrays):
        return pl.pallas_call(
            functools.partial(body, shape=shape, interpret=interpret),
            out_shape=tuple(
                jax.ShapeDtypeStruct((arrays[0].shape[0], *sizes), dtype)
                for sizes, dtype in results
            ),
            grid=(arrays[0].shape[0],),
            compiler_params=triton.CompilerParams(num_warps=TILES.warps, num_stages=1),
            interpret=interpret,
            name=f"token_learner_{direction}",
        )(kernel, *arrays)

    return batch_parallel(run, num_shared=1)(kernel, x, *rest)


def _is_half(dtype):
    return dtype in (jnp.bfloat16, jnp.float16)


def _block(size):
    """The smallest block that holds so many, of at least 16, as products need."""
    return max(16, 2 ** math.ceil(math.log2(size)))


def _blocks(size):
    """Starts and sizes of blocks that hold so many, with less left over than in one."""
    blocks, start = [], 0
    while start < size:
        length = max(16, 2 ** int(math.log2(size - start)))
        blocks.append((start, length))
        start += length
    return blocks


class _Block:
    """Blocks of the arrays of this program's frame."""

    def __init__(self, interpret):
        self.interpret = interpret
        self.frame = pl.program_id(0)

    def _view(self, ref, rows, columns):
        """A view of a block, and which of it exists, by the sizes of the array."""
        (first, rows), (start, columns) = rows, columns
        # Not numbers, which are checked against the sizes of the array.
        zero = self.frame * 0
        slices = pl.ds(first + zero, rows), pl.ds(start + zero, columns)
        if len(ref.shape) == 3:
            slices = self.frame, *slices
        inside = jnp.logical_and(
            (first + jnp.arange(rows))[:, None] < ref.shape[-2],
            (start + jnp.arange(columns))[None] < ref.shape[-1],
        )
        return ref.at[slices], inside

    def load(self, ref, rows, columns):
        """Loads a block of the frame, or of what all frames share; zero outside."""
        view, inside = self._view(ref, rows, columns)
        return triton.load(view, mask=inside, other=0.0)

    def store(self, ref, rows, columns, x):
        view, inside = self._view(ref, rows, columns)
        triton.store(view, x.astype(ref.dtype), mask=inside)

    def barrier(self):
        if not self.interpret:
            triton.debug_barrier()


class _Frame(_Block):
    """Blocks of a frame and the sizes of them."""

    def __init__(self, shape, interpret):
        super().__init__(interpret)
        self.shape = shape
        self.positions, self.tokens = _block(shape.positions), _block(shape.tokens)
        self.taps = _blocks(shape.taps)
        self.steps = pl.cdiv(shape.channels, TILES.step)

    def channels(self, step):
        """The first channel of a step, and how many it has."""
        return step * TILES.step, TILES.step

    def load_beside_kernel(self, ref, rows, kernel_ref):
        """Returns a function that loads a step's channels, and those of the kernel."""

        def load(step):
            channels = self.channels(step)
            kernels = [self.load(kernel_ref, channels, block) for block in self.taps]
            return self.load(ref, rows, channels), kernels

        return load

    def shifted(self, ref, sign, taps, columns):
        """Loads numbers of the positions that taps are away, zero outside the frame.

        Args:
            ref: Array `(frames, positions, n)`.
            sign: 1, or -1 for the positions on the other side.
            taps: Array `(1, m)`, or a number.
            columns: Array `(1, m)` of column numbers, or less than zero for none.
        """
        height, width, size = self.shape.height, self.shape.width, self.shape.kernel
        before = (size - 1) // 2
        # Of one axis as long as they can be: there is a division in each.
        rows = jnp.arange(self.positions)[:, None]
        down, right = (sign * (x - before) for x in (taps // size, taps % size))
        row, column = rows // width + down, rows % width + right
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        inside &= (rows < self.shape.positions) & (columns >= 0)
        index = rows + (down * width + right)
        shape = inside.shape
        frame = jnp.broadcast_to(self.frame, shape)
        columns = jnp.broadcast_to(columns, shape)
        return triton.load(ref.at[frame, index, columns], mask=inside, other=0.0)


def _dot(a, b, axes=(1, 0)):
    """The product of two blocks over these axes of theirs, in float32."""
    over = tuple((axis,) for axis in axes), ((), ())
    return jax.lax.dot_general(a, b, over, preferred_element_type=jnp.float32)


def _forward_kernel(kernel_ref, x_ref, y_ref, maps_ref, taps_ref, *, shape, interpret):
    here = _Frame(shape, interpret)
    positions = (0, here.positions)

    def add_taps(step, loaded, taps):
        x, kernels = loaded
        return [total + _dot(x, kernel) for total, kernel in zip(taps, kernels)]

    taps = [jnp.zeros((here.positions, size), jnp.float32) for _, size in here.taps]
    load = here.load_beside_kernel(x_ref, positions, kernel_ref)
    taps = _fused.pipelined(here.steps, load, add_taps, taps)
    for block, total in zip(here.taps, taps):
        here.store(taps_ref, positions, block, total)
    here.barrier()
    tokens = jnp.arange(here.tokens)[None]
    logits = jnp.zeros((here.positions, here.tokens), jnp.float32)
    for tap in range(shape.kernel**2):
        columns = jnp.where(tokens < shape.tokens, tap * shape.tokens + tokens, -1)
        logits += here.shifted(taps_ref, 1, tap, columns)
    maps = 1.0 / (1.0 + jnp.exp(-logits))
    here.store(maps_ref, positions, (0, here.tokens), maps)
    inside = jnp.arange(here.positions)[:, None] < shape.positions
    inside &= tokens < shape.tokens
    weights = jnp.where(inside, maps * (1.0 / shape.divisor), 0.0).astype(x_ref.dtype)

    def load_x(step):
        return here.load(x_ref, positions, here.channels(step))

    def pool(step, x, carry):
        y = _dot(weights, x, axes=(0, 0))
        here.store(y_ref, (0, here.tokens), here.channels(step), y)
        return carry

    _fused.pipelined(here.steps, load_x, pool, 0)


def _backward_kernel(
    kernel_ref,
    x_ref,
    maps_ref,
    g_ref,
    to_x_ref,
    to_taps_ref,
    logits_ref,
    *,
    shape,
    interpret,
):
    here = _Frame(shape, interpret)
    positions, tokens = (0, here.positions), (0, here.tokens)

    def load(step):
        channels = here.channels(step)
        return here.load(x_ref, positions, channels), here.load(g_ref, tokens, channels)

    def add_maps(step, loaded, to_maps):
        return to_maps + _dot(*loaded, axes=(1, 1))

    to_maps = jnp.zeros((here.positions, here.tokens), jnp.float32)
    to_maps = _fused.pipelined(here.steps, load, add_maps, to_maps)
    maps = here.load(maps_ref, positions, tokens)
    scaled = maps * (1.0 / shape.divisor)
    here.store(logits_ref, positions, tokens, to_maps * scaled * (1.0 - maps))
    here.barrier()
    to_taps = []
    for block in here.taps:
        start, size = block
        columns = start + jnp.arange(size)[None]
        taps = columns // shape.tokens
        columns = jnp.where(columns < shape.taps, columns % shape.tokens, -1)
        to_taps.append(here.shifted(logits_ref, -1, taps, columns).astype(x_ref.dtype))
        here.store(to_taps_ref, positions, block, to_taps[-1])
    weights = scaled.astype(x_ref.dtype)

    def to_x(step, loaded, carry):
        g, kernels = loaded
        x = _dot(weights, g)
        for part, kernel in zip(to_taps, kernels):
            x += _dot(part, kernel, axes=(1, 1))
        here.store(to_x_ref, positions, here.channels(step), x)
        return carry

    load = here.load_beside_kernel(g_ref, tokens, kernel_ref)
    _fused.pipelined(here.steps, load, to_x, 0)
