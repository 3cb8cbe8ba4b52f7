import dataclasses

import keras
import numpy as np
from keras import ops

from tokenlearner_keras.checkpoints import resize_position_embeddings
from tokenlearner_keras.layers import PatchEmbedding, PositionEmbedding


@dataclasses.dataclass(frozen=True)
class TransferReport:
    """What `transfer_weights` did, by the names of layers.

    Attributes:
        copied: Layers whose weights were copied.
        resized: Layers whose position embeddings were resized.
        fresh: Layers of the target that keep their own weights: a new head, a
            TokenLearner.
        unused: Layers of the source whose weights went nowhere.
    """

    copied: tuple[str, ...]
    resized: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


def transfer_weights(source: keras.Model, target: keras.Model) -> TransferReport:
    """Starts the fine-tuning of a ViT from a trained one, as ViT's protocol does.

    Copies the weights of all layers of the same name and shapes. Position embeddings of
    another grid are resized, linearly with aligned corners, so that the target may have
    another image size. A layer whose shapes differ otherwise, such as a head for
    another number of classes, keeps its own weights; `vit` starts its head from zeros.

    Args:
        source: A trained model of `tokenlearner_keras.models.vit`.
        target: The model to fine-tune, of the same variant.

    Returns:
        A `TransferReport`.

    Raises:
        ValueError: if no layer fits.

    Example:

    >>> model = tlk.models.vit("S/32", input_shape=(384, 384, 3), num_classes=37)
    >>> transfer_weights(trained_at_224, model)
    >>> model.compile(make_optimizer(VIT_FINE_TUNING), make_loss(VIT_FINE_TUNING, True))
    """
    sources = {layer.name: layer for layer in source.layers if layer.weights}
    copied, resized, fresh = [], [], []
    for layer in target.layers:
        if not layer.weights:
            continue
        old = sources.get(layer.name)
        shapes = [tuple(w.shape) for w in layer.weights]
        if old is not None and [tuple(w.shape) for w in old.weights] == shapes:
            values = [np.array(ops.convert_to_numpy(w)) for w in old.weights]
            copied.append(layer.name)
        elif isinstance(old, PositionEmbedding) and isinstance(
            layer, PositionEmbedding
        ):
            values = [_resize(old.weights[0], source, layer.weights[0], target)]
            resized.append(layer.name)
        else:
            fresh.append(layer.name)
            continue
        for weight, value in zip(layer.weights, values):
            weight.assign(value)
    if not copied:
        raise ValueError(
            "Arguments `source` and `target` must have layers of the same names and "
            f"shapes. Received: a source with {sorted(sources)} and a target with "
            f"{fresh}"
        )
    used = {*copied, *resized}
    unused = [name for name in sources if name not in used]
    return TransferReport(tuple(copied), tuple(resized), tuple(fresh), tuple(unused))


def _resize(old, source, new, target):
    old = np.array(ops.convert_to_numpy(old))
    grids = [_grid(source), _grid(target)]
    prefixes = [
        weights.shape[-2] - grid[0] * grid[1]
        for weights, grid in zip((old, new), grids)
    ]
    if prefixes[0] != prefixes[1]:
        raise ValueError(
            "Arguments `source` and `target` must have equally many class tokens. "
            f"Received: {prefixes[0]} and {prefixes[1]}"
        )
    special, patches = np.split(old, [prefixes[0]], axis=-2)
    patches = resize_position_embeddings(patches, *grids)
    return np.concatenate([special, patches], axis=-2)


def _grid(model):
    layers = [layer for layer in model.layers if isinstance(layer, PatchEmbedding)]
    if len(layers) != 1:
        raise ValueError(
            "Position embeddings can be resized for models with one PatchEmbedding. "
            f"Received: model '{model.name}' with {len(layers)}"
        )
    return layers[0].compute_grid_shape(tuple(layers[0].input.shape))
