"""Argument checks shared by the layers: each names what came and what was expected."""

import math


def check_positive_int(name: str, value) -> int:
    """Returns `value` if it is an integer of at least 1, else raises `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"Argument `{name}` must be an integer of at least 1. "
            f"Received: {name}={value!r}"
        )
    return value


def check_choice(name: str, value, choices):
    """Returns `value` if it is one of `choices`, else raises `ValueError`."""
    if value not in choices:
        raise ValueError(
            f"Invalid value for argument `{name}`. Expected one of "
            f"{tuple(choices)}. Received: {name}={value!r}"
        )
    return value


def check_rate(name: str, value) -> float:
    """Returns `value` if it lies in [0, 1), else raises `ValueError`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 1:
        raise ValueError(
            f"Argument `{name}` must be a number in [0, 1). Received: {name}={value!r}"
        )
    return float(value)


def check_channels(layer, input_shape) -> int:
    """Returns the size of the last axis, which must be known when a layer is built."""
    channels = input_shape[-1]
    if channels is None:
        raise ValueError(
            f"The last axis (channels) of the input of layer '{layer.name}' must be "
            f"known when the layer is built. Received: input_shape={input_shape}"
        )
    return channels


def check_sizes(name: str, value, length: int) -> tuple[int, ...]:
    """Returns `value` as a tuple of `length` positive integers.

    One integer stands for `length` equal ones.
    """
    if isinstance(value, int):
        value = (value,) * length
    try:
        value = tuple(value)
    except TypeError:
        value = (value,)
    if len(value) != length:
        raise ValueError(
            f"Argument `{name}` must be an integer or {length} integers of at least 1. "
            f"Received: {name}={value!r}"
        )
    return tuple(
        check_positive_int(f"{name}[{axis}]", size) for axis, size in enumerate(value)
    )


def check_shape(name: str, value, axes: tuple[str, ...]) -> tuple[int, ...]:
    """Returns `value` as a tuple of positive integers, one for each of `axes`."""
    is_shape = isinstance(value, (tuple, list)) and len(value) == len(axes)
    if not is_shape or any(
        isinstance(size, bool) or not isinstance(size, int) or size < 1
        for size in value
    ):
        raise ValueError(
            f"Argument `{name}` must be positive integers ({', '.join(axes)}). "
            f"Received: {name}={value!r}"
        )
    return tuple(value)


def check_divisible(layer, name: str, sizes, input_shape):
    """Raises `ValueError` unless `sizes` divide the axes of `input_shape` before last.

    Axes of unknown size pass.
    """
    axes = tuple(input_shape)[-1 - len(sizes) : -1]
    if any(axis is not None and axis % size for axis, size in zip(axes, sizes)):
        raise ValueError(
            f"Argument `{name}` of layer '{layer.name}' must divide the size of its "
            f"input. Received: {name}={tuple(sizes)} for an input of size {axes}"
        )


def check_grid_shape(grid_shape) -> tuple[int, int] | None:
    """Returns `grid_shape` as a tuple of two positive integers, or `None`."""
    if grid_shape is None:
        return None
    try:
        height, width = grid_shape
    except (TypeError, ValueError):
        raise ValueError(
            "Argument `grid_shape` must be a pair (height, width). "
            f"Received: grid_shape={grid_shape!r}"
        ) from None
    return (
        check_positive_int("grid_shape[0]", height),
        check_positive_int("grid_shape[1]", width),
    )


def resolve_grid(layer, num_positions, grid_shape) -> tuple[int, int]:
    """Returns (height, width) of a flattened grid of `num_positions` positions.

    Args:
        layer: The layer that asks; named in the error.
        num_positions: Integer or `None` (unknown), the length of the sequence.
        grid_shape: Pair of integers, or `None` for a square grid.
    """
    if grid_shape is not None:
        height, width = grid_shape
        if num_positions is not None and height * width != num_positions:
            raise ValueError(
                f"`grid_shape` of layer '{layer.name}' must multiply to the number of "
                f"positions of its input. Received: grid_shape={tuple(grid_shape)} "
                f"({height * width} positions) for an input of {num_positions} "
                "positions"
            )
        return height, width
    if num_positions is None:
        raise ValueError(
            f"Layer '{layer.name}' received a flattened input of unknown length: pass "
            "`grid_shape=(height, width)`."
        )
    side = math.isqrt(num_positions)
    if side * side != num_positions:
        raise ValueError(
            f"Layer '{layer.name}' received {num_positions} positions, which are not a "
            "square grid: pass `grid_shape=(height, width)`."
        )
    return side, side
