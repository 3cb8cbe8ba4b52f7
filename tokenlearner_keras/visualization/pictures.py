"""Attention maps painted over images and clips (paper, figure 8)."""

from collections.abc import Sequence

import numpy as np
from keras import ops

from tokenlearner_keras.layers._checks import check_choice, check_positive_int

NORMALIZATIONS = ("map", "none")
INTERPOLATIONS = ("bilinear", "nearest", "bicubic")


def attention_overlay(
    images,
    maps,
    tokens: Sequence[int] | None = None,
    value_range: tuple[float, float] | None = None,
    alpha: float = 0.8,
    colormap: str = "viridis",
    normalize: str = "map",
    interpolation: str = "bilinear",
) -> np.ndarray:
    """Paints attention maps over the images that they belong to (paper, figure 8).

    Every map is enlarged to the size of the image and painted over its grey version:
    opaque where the map is high, clear where it is low.

    Args:
        images: Array of shape `(batch, height, width, channels)` with 1 or 3 channels,
            or `(batch, time, height, width, channels)`.
        maps: Array of shape `(batch, num_tokens, grid_height, grid_width)`, or
            `(batch, time, num_tokens, grid_height, grid_width)`.
        tokens: Indices of the tokens to show. `None` shows all.
        value_range: Pixel values of black and white. `None` takes (0, 255) for uint8
            images and (-1, 1) for others.
        alpha: float from 0 to 1. Opacity of the highest value.
        colormap: Name of a matplotlib colormap.
        normalize: `"map"` stretches every map from its lowest to its highest value;
            `"none"` takes the values as they are, from 0 to 1.
        interpolation: `"bilinear"`, `"nearest"` (shows the cells) or `"bicubic"`.

    Returns:
        float32 array of RGB values in [0, 1], of shape
        `(batch, num_shown, height, width, 3)` or
        `(batch, time, num_shown, height, width, 3)`.

    Raises:
        ValueError: for shapes that do not fit each other, a token that does not exist,
            or pixels outside `value_range`.
    """
    check_choice("normalize", normalize, NORMALIZATIONS)
    check_choice("interpolation", interpolation, INTERPOLATIONS)
    if not 0 <= alpha <= 1:
        raise ValueError(
            f"Argument `alpha` must be a number in [0, 1]. Received: alpha={alpha!r}"
        )
    pixels = _to_unit_range(images, value_range)
    maps = np.asarray(ops.convert_to_numpy(maps), "float32")
    _check_pair(pixels, maps)
    maps = np.take(maps, _token_indices(tokens, maps.shape[-3]), axis=-3)
    if normalize == "map":
        low = maps.min(axis=(-2, -1), keepdims=True)
        span = maps.max(axis=(-2, -1), keepdims=True) - low
        maps = np.where(span > 0, (maps - low) / np.where(span > 0, span, 1), 0)
    height, width = pixels.shape[-3:-1]
    strength = _enlarge(maps, (height, width), interpolation)[..., np.newaxis]
    strength = np.clip(strength, 0.0, 1.0)
    color = _colors(strength[..., 0], colormap)
    grey = (_to_rgb(pixels) @ np.array([0.299, 0.587, 0.114], "float32"))[..., None]
    grey = np.expand_dims(grey, -4)  # The axis of the tokens.
    return ((1 - alpha * strength) * grey + alpha * strength * color).astype("float32")


def attention_grid(
    images,
    maps,
    tokens: Sequence[int] | None = None,
    value_range: tuple[float, float] | None = None,
    columns: int | None = None,
    **kwargs,
) -> np.ndarray:
    """Returns one picture an example: the input beside its overlays.

    Args:
        images: As for `attention_overlay`.
        maps: As for `attention_overlay`.
        tokens: Indices of the tokens to show. `None` shows all.
        value_range: As for `attention_overlay`.
        columns: int or `None`. For images, the tiles side by side: the input comes
            first, then the tokens, row by row. `None` makes a single row.
        **kwargs: Further arguments of `attention_overlay`.

    Returns:
        float32 array of RGB values in [0, 1]. Images make a grid of the input and its
        tokens, `(batch, rows * height, columns * width, 3)`, black where no tile is.
        Clips make a film strip: a column a frame, the input on top and a row a token
        below, `(batch, (1 + num_shown) * height, time * width, 3)`.

    Raises:
        ValueError: for `columns` with clips, and as `attention_overlay`.
    """
    tiles = attention_tiles(images, maps, tokens, value_range, **kwargs)
    if tiles.ndim == 5:
        return lay_out(tiles, tiles.shape[1] if columns is None else columns)
    if columns is not None:
        raise ValueError(
            "Argument `columns` must be `None` for clips, whose columns are frames "
            f"(`attention_animation` shows them in time). Received: columns={columns}"
        )
    batch, time, shown, height, width, _ = tiles.shape
    strips = tiles.swapaxes(1, 2).reshape(batch, shown * time, height, width, 3)
    return lay_out(strips, time)


def attention_figure(
    images,
    maps,
    tokens: Sequence[int] | None = None,
    titles: Sequence[str] | None = None,
    value_range: tuple[float, float] | None = None,
    tile_size: float = 1.2,
    frames: Sequence[int] | None = None,
    **kwargs,
):
    """Draws figure 8 of the paper: inputs and what chosen tokens look at.

    Args:
        images: As for `attention_overlay`.
        maps: As for `attention_overlay`.
        tokens: Indices of the tokens to show. `None` shows all.
        titles: One string an example, such as its class. `None` writes none.
        value_range: As for `attention_overlay`.
        tile_size: Height of one image, in inches.
        frames: Indices of the frames of clips to show. `None` shows all.
        **kwargs: Further arguments of `attention_overlay`.

    Returns:
        A `matplotlib.figure.Figure` that belongs to no window; `savefig` writes it.
        Images make one row an example: the input, then its tokens. Clips make
        one strip an example: a column a frame, the input on top, a row a token.

    Raises:
        ValueError: if there is not one title an example, or for `frames` of images or
            that the clips do not have.
    """
    matplotlib = _import_matplotlib()
    if frames is not None:
        images, maps = (ops.convert_to_numpy(x) for x in (images, maps))
        length = images.shape[1] if images.ndim == 5 else 0
        frames = list(frames)
        if not _are_indices(frames, length):
            raise ValueError(
                f"Argument `frames` must have indices of the {length} frames of the "
                f"clips. Received: frames={frames} for images of shape {images.shape}"
            )
        images, maps = images[:, frames], maps[:, frames]
    tiles = attention_tiles(images, maps, tokens, value_range, **kwargs)
    shown = _token_indices(tokens, np.shape(maps)[-3])
    labels = ["input", *(f"token {token}" for token in shown)]
    if titles is not None and len(titles) != len(tiles):
        raise ValueError(
            "Argument `titles` must have one string for each example. Received: "
            f"{len(titles)} titles for {len(tiles)} examples"
        )
    is_video, headings = tiles.ndim == 6, labels
    if is_video:
        numbers = range(tiles.shape[1]) if frames is None else frames
        headings = [f"frame {number}" for number in numbers]
        # (batch, time, shown, ...) to rows of frames: (batch * shown, time, ...).
        tiles = tiles.swapaxes(1, 2).reshape(-1, tiles.shape[1], *tiles.shape[3:])
    rows, columns, height, width, _ = tiles.shape
    figure = matplotlib.figure.Figure(
        figsize=(columns * tile_size * width / height + 1, rows * tile_size + 0.4),
        layout="compressed",
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        for column in range(columns):
            axis = axes[row, column]
            axis.imshow(tiles[row, column], vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(headings[column], fontsize=9)
        if is_video:
            example, index = divmod(row, len(labels))
            text = labels[index]
            if index == 0 and titles is not None:
                text = titles[example]
        else:
            text = "" if titles is None else titles[row]
        axes[row, 0].set_ylabel(text, fontsize=9)
    return figure


def attention_tiles(images, maps, tokens=None, value_range=None, **kwargs):
    """Returns the inputs and their overlays as tiles.

    Args:
        images: As for `attention_overlay`, as are the others.

    Returns:
        float32 array of RGB values in [0, 1], of shape
        `(batch, 1 + num_shown, height, width, 3)` or
        `(batch, time, 1 + num_shown, height, width, 3)`.
    """
    overlays = attention_overlay(images, maps, tokens, value_range, **kwargs)
    inputs = _to_rgb(_to_unit_range(images, value_range))
    return np.concatenate([np.expand_dims(inputs, -4), overlays], axis=-4)


def lay_out(tiles, columns):
    """Puts tiles, `(..., tiles, height, width, 3)`, into one picture, row by row."""
    check_positive_int("columns", columns)
    *leading, count, height, width, _ = tiles.shape
    rows = -(-count // columns)
    missing = [(0, 0)] * len(leading) + [(0, rows * columns - count)] + [(0, 0)] * 3
    tiles = np.pad(tiles, missing).reshape(*leading, rows, columns, height, width, 3)
    tiles = np.moveaxis(tiles, -3, -4)
    return tiles.reshape(*leading, rows * height, columns * width, 3)


def _import_matplotlib():
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(
            "Attention maps are drawn with matplotlib: "
            "`pip install tokenlearner-keras[images]`."
        ) from error
    return matplotlib


def _colors(values, colormap):
    matplotlib = _import_matplotlib()
    if colormap not in matplotlib.colormaps:
        raise ValueError(
            "Argument `colormap` must be the name of a matplotlib colormap, such as "
            f"'viridis'. Received: colormap={colormap!r}"
        )
    return matplotlib.colormaps[colormap](values)[..., :3]


def _to_unit_range(images, value_range):
    images = np.asarray(ops.convert_to_numpy(images))
    if value_range is None:
        value_range = (0.0, 255.0) if images.dtype == np.uint8 else (-1.0, 1.0)
    low, high = value_range
    images = (images.astype("float32") - low) / (high - low)
    if images.size and not (images.min() >= -1e-3 and images.max() <= 1 + 1e-3):
        raise ValueError(
            "The values of `images` must lie in `value_range`. Received: "
            f"value_range={tuple(value_range)} for values from "
            f"{images.min() * (high - low) + low:.3g} to "
            f"{images.max() * (high - low) + low:.3g}"
        )
    return np.clip(images, 0.0, 1.0)


def _to_rgb(pixels):
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def _check_pair(pixels, maps):
    ranks = {4: 4, 5: 5}
    leading = 2 if pixels.ndim == 5 else 1
    if (
        ranks.get(pixels.ndim) != maps.ndim
        or pixels.shape[:leading] != maps.shape[:leading]
        or pixels.shape[-1] not in (1, 3)
    ):
        raise ValueError(
            "Arguments `images` and `maps` must have the shapes (batch, height, width, "
            "channels) and (batch, num_tokens, grid_height, grid_width), or (batch, "
            "time, height, width, channels) and (batch, time, num_tokens, grid_height, "
            "grid_width), with 1 or 3 channels. Received: images of shape "
            f"{pixels.shape} and maps of shape {maps.shape}"
        )


def _token_indices(tokens, num_tokens):
    if tokens is None:
        return list(range(num_tokens))
    tokens = list(tokens)
    if not _are_indices(tokens, num_tokens):
        raise ValueError(
            f"Argument `tokens` must list indices from 0 to {num_tokens - 1}. "
            f"Received: tokens={tokens}"
        )
    return tokens


def _are_indices(values, length):
    return bool(values) and all(
        isinstance(value, (int, np.integer)) and 0 <= value < length for value in values
    )


def _enlarge(maps, size, interpolation):
    flat = maps.reshape(-1, *maps.shape[-2:], 1)
    flat = ops.image.resize(flat, size, interpolation, data_format="channels_last")
    return np.asarray(ops.convert_to_numpy(flat)).reshape(*maps.shape[:-2], *size)
