import functools
import math
import os
import warnings

import keras
import numpy as np

from tokenlearner_keras.checkpoints._layout import (
    encoder_entries,
    is_seed,
    load_entries,
)
from tokenlearner_keras.checkpoints._source import open_source
from tokenlearner_keras.checkpoints.position_embeddings import (
    resize_position_embeddings,
)
from tokenlearner_keras.checkpoints.report import CheckpointReport
from tokenlearner_keras.layers._checks import check_shape

BLOCK_NAMES = (
    "LayerNorm_0",
    "MultiHeadDotProductAttention_1",
    "LayerNorm_2",
    "MlpBlock_3",
)
POSITIONS = "Transformer/posembed_input/pos_embedding"
# Our one addition to the layout, for grids that are not square.
GRID_SHAPE = "Transformer/posembed_input/grid_shape"


def load_vit_npz(
    model: keras.Model,
    path: str | os.PathLike,
    load_head: bool = True,
    position_grid: tuple[int, int] | None = None,
) -> CheckpointReport:
    """Loads a published ViT or AugReg checkpoint into a model of `vit`.

    Position embeddings of another grid are resized, linearly with aligned corners. A
    TokenLearner or TokenFuser of the model stays unset: the checkpoints have none.
    Every weight is checked before the first is set, so that an error leaves the model
    as it was. Arrays are read one at a time.

    Args:
        model: A model of `vit`, with or without TokenLearner.
        path: Path to the `.npz` file. Pickles are never loaded.
        load_head: bool. Whether to load the head and the layer before it
            (`representation_size`). `False` leaves them as they are, for other classes.
        position_grid: pair of ints or `None`. `(height, width)` of the checkpoint's
            position embeddings. `None` takes the grid that `save_vit_npz` noted, or a
            square, or the model's own if the number of positions is no square.

    Returns:
        A `CheckpointReport`: what was set, what was not used, what stays unset. It is
        also warned of if anything is unused or unset.

    Raises:
        ValueError: naming the weight, if one is missing, has another shape, is not
            finite or cannot be read; if the file is no archive; if `model` is of
            another kind.
        FileNotFoundError: if there is no such file.
    """
    entries = encoder_entries(model, "", BLOCK_NAMES, head="head")
    if not load_head:
        head = ("head/", "pre_logits/")
        entries = [entry for entry in entries if not entry.name.startswith(head)]
    grid_shape = _grid_shape(model)
    has_class_token = any(entry.name == "cls" for entry in entries)
    with open_source(path) as source:
        if GRID_SHAPE in source and position_grid is None:
            position_grid = source.read_integers(GRID_SHAPE)
        convert = functools.partial(
            _convert_positions,
            source_has_class_token="cls" in source,
            has_class_token=has_class_token,
            position_grid=position_grid,
            grid_shape=grid_shape,
        )
        entries = [
            type(entry)(entry.name, entry.variable, convert)
            if entry.name == POSITIONS
            else entry
            for entry in entries
        ]
        names = [name for name in source.names if name != GRID_SHAPE]
        return load_entries(source, entries, model, names=names)


def save_vit_npz(model: keras.Model, path: str | os.PathLike) -> CheckpointReport:
    """Saves a model of `vit` in the layout of the published ViT checkpoints.

    `load_vit_npz` gives the same weights back exactly. The file is written beside its
    place and renamed, so that an interrupted save leaves the old file.

    Args:
        model: A model of `vit`. Its TokenLearner and TokenFuser have no place in the
            layout: they are left out, with a warning; `model.save` keeps all.
        path: Path of the `.npz` file to write.

    Returns:
        A `CheckpointReport`, in which `unset` are the weights that were left out.

    Raises:
        ValueError: if `model` is of another kind.
    """
    entries = encoder_entries(model, "", BLOCK_NAMES, head="head")
    grid_shape = _grid_shape(model)
    saved = {id(entry.variable) for entry in entries}
    left_out = tuple(
        variable.path
        for variable in model.weights
        if id(variable) not in saved and not is_seed(variable)
    )
    if left_out:
        warnings.warn(
            f"{len(left_out)} weights of '{model.name}' have no place in the published "
            f"ViT layout and are not saved: {', '.join(left_out)}",
            stacklevel=2,
        )
    arrays = {
        entry.name: keras.ops.convert_to_numpy(entry.variable) for entry in entries
    }
    if grid_shape[0] != grid_shape[1]:
        arrays[GRID_SHAPE] = np.array(grid_shape, "int32")
    path = os.fspath(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return CheckpointReport(
        matched={entry.name: entry.variable.path for entry in entries},
        unused=(),
        unset=left_out,
    )


def _grid_shape(model):
    """Returns (height, width) of the patches of a `vit` model."""
    embedding = next(
        (layer for layer in model.layers if layer.name == "patch_embedding"), None
    )
    if embedding is None:
        raise ValueError(
            "Argument `model` must be built by `tokenlearner_keras.models.vit`. "
            f"Received: '{model.name}', which has no layer 'patch_embedding'"
        )
    return embedding.compute_grid_shape(embedding.input.shape)


def _convert_positions(
    embeddings, source_has_class_token, has_class_token, position_grid, grid_shape
):
    """Returns the checkpoint's position embeddings for the model's grid."""
    if embeddings.ndim != 3:
        return embeddings  # Left for the check of shapes.
    class_position = embeddings[:, :0]
    if source_has_class_token:
        class_position, embeddings = embeddings[:, :1], embeddings[:, 1:]
    positions = embeddings.shape[1]
    if position_grid is None:
        side = math.isqrt(positions)
        if side * side == positions:
            position_grid = (side, side)
        elif positions == math.prod(grid_shape):
            position_grid = grid_shape
        else:
            raise ValueError(
                f"Weight '{POSITIONS}' has {positions} positions, which are not a "
                "square grid: pass `position_grid=(height, width)`."
            )
    position_grid = check_shape("position_grid", position_grid, ("height", "width"))
    embeddings = resize_position_embeddings(embeddings, position_grid, grid_shape)
    if has_class_token:
        embeddings = np.concatenate([class_position, embeddings], axis=1)
    return embeddings
