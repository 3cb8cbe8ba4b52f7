"""What each learned token looks at: attention maps over images (paper, figure 8)."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tokenlearner_keras.layers import TokenLearner
from tokenlearner_keras.layers._checks import check_choice, check_positive_int

NORMALIZATIONS = ("map", "none")
INTERPOLATIONS = ("bilinear", "nearest", "bicubic")


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class AttentionMaps(keras.layers.Wrapper):
    """Returns the attention maps of a `TokenLearner` instead of its tokens.

    The functional API takes the number of a layer's outputs from its first call, so
    that a layer that has been called without its maps cannot add them later. This layer
    can, with the same weights.

    Args:
        layer: The `TokenLearner`.
        **kwargs: Base layer arguments, such as `name`.

    Call arguments:
        inputs: As for the `TokenLearner`.
        mask: As for the `TokenLearner`.
        training: As for the `TokenLearner`.

    Output:
        The maps, of shape `(batch, num_tokens, height, width)` or
        `(batch, time, num_tokens, height, width)`.

    Raises:
        ValueError: at construction for a layer that is not a `TokenLearner`.
    """

    def __init__(self, layer, **kwargs):
        super().__init__(layer, **kwargs)
        if not isinstance(layer, TokenLearner):
            raise ValueError(
                f"Argument `layer` must be a `TokenLearner`. Received: layer={layer!r}"
            )

    def call(self, inputs, mask=None, training=None):
        _, maps = self.layer(
            inputs, mask=mask, training=training, return_attention_maps=True
        )
        return maps

    def compute_output_spec(self, inputs, mask=None, training=None):
        _, maps = self.layer.compute_output_spec(inputs, return_attention_maps=True)
        return maps


def attention_tensors(model: keras.Model) -> dict[str, Any]:
    """Returns the attention maps of every `TokenLearner` in a functional model.

    Args:
        model: A functional or `Sequential` model; models nested in it are searched as
            well.

    Returns:
        Dictionary in the order of execution, from the layer's name (behind the names
        of the models that it is nested in, as in `"backbone/token_learner"`) to the
        symbolic tensor of its maps, `(batch, num_tokens, height, width)` or
        `(batch, time, num_tokens, height, width)`. `keras.Model(model.inputs, ...)` of
        them shares the weights of `model`.

    Raises:
        ValueError: for a model that is not functional, or not built.
    """
    # A `Sequential` holds its graph in a functional model, once it is built.
    functional = getattr(model, "_functional", model)
    if functional is None or not hasattr(functional, "operations"):
        raise ValueError(
            "Attention maps can be read from a functional model, or a built "
            f"`Sequential`, alone. Received: model={model!r} of type "
            f"{type(model).__name__}"
        )
    tensors = {}
    for layer in functional.operations:
        if isinstance(layer, TokenLearner):
            arguments = _call_arguments(functional, layer)
            maps_layer = AttentionMaps(layer, name=f"{layer.name}_maps")
            tensors[layer.name] = maps_layer(*arguments.args, **arguments.kwargs)
        elif isinstance(layer, keras.Model) and _has_token_learner(layer):
            inner = attention_tensors(layer)
            arguments = _call_arguments(functional, layer)
            outputs = keras.Model(layer.inputs, list(inner.values()))(arguments.args[0])
            for name, maps in zip(inner, outputs, strict=True):
                tensors[f"{layer.name}/{name}"] = maps
    return tensors


def attention_model(model: keras.Model, layer: str | None = None) -> keras.Model:
    """Returns a model from the inputs of `model` to the maps of one `TokenLearner`.

    Args:
        model: A functional or `Sequential` model. Its weights are shared, so that the
            maps follow its training.
        layer: Name of the layer, as in `attention_tensors`. `None` takes the first,
            as figure 8 of the paper does: later ones see inputs that are mixed
            already.

    Returns:
        A `keras.Model` with the output `(batch, num_tokens, height, width)`, or
        `(batch, time, num_tokens, height, width)` for videos.

    Raises:
        ValueError: for a model without a `TokenLearner`, or without one of that name.
    """
    tensors = attention_tensors(model)
    if not tensors:
        raise ValueError(
            f"Model '{model.name}' has no `TokenLearner` layer, so it has no attention "
            "maps."
        )
    if layer is None:
        layer = next(iter(tensors))
    elif layer not in tensors:
        raise ValueError(
            f"Argument `layer` must name a `TokenLearner` layer of model "
            f"'{model.name}', one of {tuple(tensors)}. Received: layer={layer!r}"
        )
    return keras.Model(model.inputs, tensors[layer], name=f"{model.name}_attention")


def attention_maps(
    model: keras.Model, images, layer: str | None = None, batch_size: int = 32
) -> np.ndarray:
    """Returns the maps of a model's `TokenLearner` for some images or clips.

    Args:
        model: A functional or `Sequential` model with a `TokenLearner`.
        images: Array of what `model` takes, with a batch axis.
        layer: Name of the layer, as in `attention_tensors`. `None` takes the first.
        batch_size: int. Images that are computed at once.

    Returns:
        float32 array of shape `(batch, num_tokens, height, width)`, or
        `(batch, time, num_tokens, height, width)` for clips.
    """
    maps = attention_model(model, layer).predict(
        images, batch_size=batch_size, verbose=0
    )
    return np.asarray(maps, "float32")


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
    **kwargs,
) -> np.ndarray:
    """Returns one picture an example: the input beside its overlays.

    Args:
        images: As for `attention_overlay`.
        maps: As for `attention_overlay`.
        tokens: Indices of the tokens to show. `None` shows all.
        value_range: As for `attention_overlay`.
        **kwargs: Further arguments of `attention_overlay`.

    Returns:
        float32 array of RGB values in [0, 1]. Images make a row of the input and its
        tokens, `(batch, height, (1 + num_shown) * width, 3)`. Clips make a film strip:
        a column a frame, the input on top and a row a token below,
        `(batch, (1 + num_shown) * height, time * width, 3)`.
    """
    overlays = attention_overlay(images, maps, tokens, value_range, **kwargs)
    inputs = _to_rgb(_to_unit_range(images, value_range))
    tiles = np.concatenate([np.expand_dims(inputs, -4), overlays], axis=-4)
    if tiles.ndim == 5:
        batch, columns, height, width, _ = tiles.shape
        rows = 1
        tiles = tiles[:, np.newaxis]
    else:
        tiles = tiles.swapaxes(1, 2)
        batch, rows, columns, height, width, _ = tiles.shape
    tiles = tiles.transpose(0, 1, 3, 2, 4, 5)
    return tiles.reshape(batch, rows * height, columns * width, 3)


def attention_figure(
    images,
    maps,
    tokens: Sequence[int] | None = None,
    titles: Sequence[str] | None = None,
    value_range: tuple[float, float] | None = None,
    tile_size: float = 1.2,
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
        **kwargs: Further arguments of `attention_overlay`.

    Returns:
        A `matplotlib.figure.Figure` that belongs to no window; `savefig` writes it.
        Images make one row an example: the input, then its tokens. Clips make
        one strip an example: a column a frame, the input on top, a row a token.
    """
    matplotlib = _import_matplotlib()
    overlays = attention_overlay(images, maps, tokens, value_range, **kwargs)
    inputs = _to_rgb(_to_unit_range(images, value_range))
    shown = _token_indices(tokens, np.shape(maps)[-3])
    labels = ["input", *(f"token {token}" for token in shown)]
    if titles is not None and len(titles) != len(inputs):
        raise ValueError(
            "Argument `titles` must have one string for each example. Received: "
            f"{len(titles)} titles for {len(inputs)} examples"
        )
    tiles = np.concatenate([np.expand_dims(inputs, -4), overlays], axis=-4)
    is_video = tiles.ndim == 6
    if is_video:
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
                axis.set_title(
                    f"frame {column}" if is_video else labels[column], fontsize=9
                )
        if is_video:
            example, index = divmod(row, len(labels))
            text = labels[index]
            if index == 0 and titles is not None:
                text = titles[example]
        else:
            text = "" if titles is None else titles[row]
        axes[row, 0].set_ylabel(text, fontsize=9)
    return figure


class AttentionMapsCallback(keras.callbacks.Callback):
    """Writes what the tokens look at to TensorBoard while a model trains.

    Args:
        log_dir: Folder of the event files: that of `keras.callbacks.TensorBoard`, say.
        images: Array of the few images or clips to show, as the model takes them.
        layer: Name of the `TokenLearner`, as in `attention_tensors`. `None` takes the
            first.
        tokens: Indices of the tokens to show. `None` shows all.
        every: int. Epochs from one picture to the next; the last epoch of a run that
            is not a multiple has none.
        value_range: As for `attention_overlay`.
        name: Name of the pictures in TensorBoard.
        **kwargs: Further arguments of `attention_overlay`.
    """

    def __init__(
        self,
        log_dir: str,
        images,
        layer: str | None = None,
        tokens: Sequence[int] | None = None,
        every: int = 1,
        value_range: tuple[float, float] | None = None,
        name: str = "attention_maps",
        **kwargs,
    ):
        super().__init__()
        self.log_dir = str(log_dir)
        self.images = np.asarray(images)
        self.layer = layer
        self.tokens = tokens
        self.every = check_positive_int("every", every)
        self.value_range = value_range
        self.name = name
        self.overlay_arguments = kwargs
        self._maps_model = None
        self._writer = None

    def on_train_begin(self, logs=None):
        import tensorflow as tf

        self._maps_model = attention_model(self.model, self.layer)
        self._writer = tf.summary.create_file_writer(self.log_dir)

    def on_epoch_end(self, epoch, logs=None):
        import tensorflow as tf

        if (epoch + 1) % self.every:
            return
        pictures = attention_grid(
            self.images,
            self._maps_model.predict(self.images, verbose=0),
            self.tokens,
            self.value_range,
            **self.overlay_arguments,
        )
        with self._writer.as_default():
            tf.summary.image(self.name, pictures, step=epoch, max_outputs=len(pictures))
        self._writer.flush()

    def on_train_end(self, logs=None):
        self._writer.close()


def _has_token_learner(model):
    return any(isinstance(x, TokenLearner) for x in model._flatten_layers())


def _call_arguments(model, layer):
    """Returns the arguments of the first call of `layer` inside `model`."""
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            if node.operation is layer:
                return node.arguments
    raise AssertionError(f"Layer {layer.name} is not called inside {model.name}.")


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
    if not tokens or not all(
        isinstance(token, (int, np.integer)) and 0 <= token < num_tokens
        for token in tokens
    ):
        raise ValueError(
            f"Argument `tokens` must list indices from 0 to {num_tokens - 1}. "
            f"Received: tokens={tokens}"
        )
    return tokens


def _enlarge(maps, size, interpolation):
    flat = maps.reshape(-1, *maps.shape[-2:], 1)
    flat = ops.image.resize(flat, size, interpolation, data_format="channels_last")
    return np.asarray(ops.convert_to_numpy(flat)).reshape(*maps.shape[:-2], *size)
