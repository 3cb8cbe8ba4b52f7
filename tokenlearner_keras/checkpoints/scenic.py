import os
from collections.abc import Mapping

import keras
import numpy as np

from tokenlearner_keras.checkpoints._layout import (
    Entry,
    block_entries,
    encoder_entries,
    load_entries,
    token_fuser_entries,
    token_learner_entries,
)
from tokenlearner_keras.checkpoints._source import open_source
from tokenlearner_keras.checkpoints.report import CheckpointReport
from tokenlearner_keras.layers import TokenFuser, TokenLearner, TransformerBlock

BLOCK_NAMES = (
    "LayerNorm_0",
    "MultiHeadDotProductAttention_0",
    "LayerNorm_1",
    "MlpBlock_0",
)


def load_scenic(
    model_or_layer: keras.Model | keras.layers.Layer,
    weights: str | os.PathLike | Mapping[str, np.ndarray],
    allow_missing: bool = False,
) -> CheckpointReport:
    """Loads weights of the authors' Flax modules.

    Every weight is checked before the first is set, so that an error leaves the model
    as it was.

    Args:
        model_or_layer: A model of `vit` or `vivit`, or a built `TokenLearner`,
            `TokenFuser(mode="attention")` or `TransformerBlock`.
        weights: Path to an `.npz` file, or a mapping, from `"params/<flax path>"` to
            arrays, such as `"params/Transformer/encoder_norm/scale"`. Names that do not
            begin with `"params/"` are ignored. Pickles are never loaded.
        allow_missing: bool. Whether weights that the file lacks may stay as they are.

    Returns:
        A `CheckpointReport`: what was set, what was not used, what stays unset. It is
        also warned of if anything is unused or unset.

    Raises:
        ValueError: naming the weight, if one is missing, has another shape, is not
            finite or cannot be read; if the file is no archive; if the model or layer
            is of another kind or not built.
    """
    entries = _entries(model_or_layer)
    with open_source(weights) as source:
        return load_entries(
            source,
            entries,
            model_or_layer,
            names=[name for name in source.names if name.startswith("params/")],
            allow_missing=allow_missing,
        )


def _entries(model_or_layer) -> list[Entry]:
    if isinstance(model_or_layer, keras.Model):
        return _model_entries(model_or_layer)
    kinds = (TokenLearner, TokenFuser, TransformerBlock)
    if not isinstance(model_or_layer, kinds):
        raise ValueError(
            "Argument `model_or_layer` must be a model of `vit` or `vivit`, or a "
            "TokenLearner, TokenFuser or TransformerBlock. "
            f"Received: {model_or_layer!r}"
        )
    if not model_or_layer.built:
        raise ValueError(
            f"Layer '{model_or_layer.name}' has no weights yet: build it or call it "
            "once before loading."
        )
    if isinstance(model_or_layer, TokenLearner):
        return token_learner_entries(model_or_layer, "params")
    if isinstance(model_or_layer, TokenFuser):
        return token_fuser_entries(model_or_layer, "params")
    return block_entries(model_or_layer, "params", BLOCK_NAMES)


def _model_entries(model) -> list[Entry]:
    entries = encoder_entries(model, "params/", BLOCK_NAMES, head="output_projection")
    # Flax numbers the modules of each class in the order of their use.
    counts = {}
    for layer in model.layers:
        if isinstance(layer, TokenLearner):
            is_conv = layer.attention == "conv"
            module = "TokenLearnerModule" if is_conv else "TokenLearnerModuleV11"
            make_entries = token_learner_entries
        elif isinstance(layer, TokenFuser):
            module, make_entries = "TokenFuser", token_fuser_entries
        else:
            continue
        index = counts.get(module, 0)
        counts[module] = index + 1
        entries += make_entries(layer, f"params/Transformer/{module}_{index}")
    return entries
