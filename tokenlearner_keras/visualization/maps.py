"""The attention maps of a model's TokenLearners."""

from typing import Any

import keras
import numpy as np

from tokenlearner_keras.layers import TokenLearner


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


def _has_token_learner(model):
    return any(isinstance(x, TokenLearner) for x in model._flatten_layers())


def _call_arguments(model, layer):
    """Returns the arguments of the first call of `layer` inside `model`."""
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            if node.operation is layer:
                return node.arguments
    raise AssertionError(f"Layer {layer.name} is not called inside {model.name}.")
