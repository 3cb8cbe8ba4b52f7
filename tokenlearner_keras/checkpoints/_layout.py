"""Names of our layers' weights in Flax trees, and the loading of such trees."""

import dataclasses
import warnings
from collections.abc import Callable

import keras
import numpy as np

from tokenlearner_keras.checkpoints._source import ArraySource
from tokenlearner_keras.checkpoints.report import CheckpointReport
from tokenlearner_keras.layers import TokenFuser, TokenLearner, TransformerBlock

# Names of our sublayers' variables in Flax.
_VARIABLES = {"kernel": "kernel", "bias": "bias", "gamma": "scale", "beta": "bias"}
_ATTENTION = {
    "query": "query",
    "key": "key",
    "value": "value",
    "attention_output": "out",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One weight: its name in the checkpoint, our variable, and how to convert it.

    `convert` maps the checkpoint's array to the variable's shape, or is `None`.
    """

    name: str
    variable: keras.Variable
    convert: Callable[[np.ndarray], np.ndarray] | None = None


def simple_entries(layer, prefix: str) -> list[Entry]:
    """Entries of a layer that holds its own variables (Dense, convolution, norm)."""
    return [
        Entry(f"{prefix}/{_VARIABLES[variable.path.split('/')[-1]]}", variable)
        for variable in layer.weights
    ]


def block_entries(block: TransformerBlock, prefix: str, names) -> list[Entry]:
    """Entries of a Transformer block; `names` are those of its four parts."""
    attention_norm, attention, mlp_norm, mlp = (f"{prefix}/{name}" for name in names)
    entries = simple_entries(block.attention_norm, attention_norm)
    for variable in block.attention.weights:
        *_, projection, weight = variable.path.split("/")
        if projection in _ATTENTION:
            name = f"{attention}/{_ATTENTION[projection]}/{_VARIABLES[weight]}"
            entries.append(Entry(name, variable))
    entries += simple_entries(block.mlp_norm, mlp_norm)
    for index, layer in enumerate(block.mlp_layers):
        entries += simple_entries(layer, f"{mlp}/Dense_{index}")
    return entries


def token_learner_entries(layer: TokenLearner, prefix: str) -> list[Entry]:
    """Entries of a TokenLearner under the names of the authors' modules."""
    entries = (
        simple_entries(layer.norm, f"{prefix}/LayerNorm_0") if layer.use_norm else []
    )
    part = "Conv" if layer.attention == "conv" else "token_masking/Dense"
    for index, sublayer in enumerate(layer.attention_layers):
        entries += simple_entries(sublayer, f"{prefix}/{part}_{index}")
    return entries


def token_fuser_entries(layer: TokenFuser, prefix: str) -> list[Entry]:
    """Entries of a TokenFuser under the names of the authors' module."""
    if layer.mode != "attention":
        raise ValueError(
            f"Layer '{layer.name}' must have mode='attention', the authors' fuser. "
            f"Received: mode={layer.mode!r}"
        )
    entries = []
    if layer.use_norm:
        for index, norm in enumerate(layer.mix_norms):
            entries += simple_entries(norm, f"{prefix}/fuser_mix_norm{index + 1}")
    entries += simple_entries(layer.mix_dense, f"{prefix}/Dense_0")
    entries += simple_entries(layer.inputs_norm, f"{prefix}/LayerNorm_0")
    for index, sublayer in enumerate(layer.attention_layers):
        entries += simple_entries(sublayer, f"{prefix}/token_masking/Dense_{index}")
    return entries


def encoder_entries(model, prefix: str, block_names, head: str) -> list[Entry]:
    """Entries of a `vit` or `vivit` model, less its tokenizers and fusers."""
    layers = {layer.name: layer for layer in model.layers}
    embedding = layers.get("patch_embedding") or layers.get("tubelet_embedding")
    if embedding is None or "position_embedding" not in layers:
        raise ValueError(
            "Argument `model` must be built by `tokenlearner_keras.models.vit` or "
            "`vivit`: it needs their layers 'patch_embedding' (or 'tubelet_embedding') "
            f"and 'position_embedding'. Received: the layers {list(layers)}"
        )
    transformer = f"{prefix}Transformer"
    entries = simple_entries(embedding.projection, f"{prefix}embedding")
    if "class_token" in layers:
        entries.append(Entry(f"{prefix}cls", layers["class_token"].token))
    entries.append(
        Entry(
            f"{transformer}/posembed_input/pos_embedding",
            layers["position_embedding"].embeddings,
        )
    )
    blocks = [layer for layer in model.layers if isinstance(layer, TransformerBlock)]
    for block in blocks:
        index = block.name.removeprefix("block_")
        entries += block_entries(
            block, f"{transformer}/encoderblock_{index}", block_names
        )
    entries += simple_entries(layers["encoder_norm"], f"{transformer}/encoder_norm")
    for name, flax_name in (("pre_logits", "pre_logits"), ("head", head)):
        if name in layers:
            entries += simple_entries(layers[name], f"{prefix}{flax_name}")
    return entries


def load_entries(
    source: ArraySource, entries: list[Entry], model, names=None, allow_missing=False
) -> CheckpointReport:
    """Checks all weights, then assigns them: a bad checkpoint changes nothing.

    Args:
        source: Where the arrays are.
        entries: The weights to load.
        model: Model or layer whose other variables are reported as unset.
        names: Names in the source that may be used. Default: all.
        allow_missing: Whether weights may be missing in the source.

    Returns:
        The report, which is also warned of if anything is unused or unset.
    """
    missing = [entry.name for entry in entries if entry.name not in source]
    if missing and not allow_missing:
        raise ValueError(
            f"{len(missing)} weight(s) that '{model.name}' needs are missing in "
            f"{source}: {', '.join(missing)}. Found: {_abbreviate(source.names)}"
        )
    entries = [entry for entry in entries if entry.name in source]
    # One array at a time, twice, rather than all arrays at once.
    for entry in entries:
        array = _read(source, entry)
        expected = tuple(entry.variable.shape)
        if array.shape != expected:
            raise ValueError(
                f"Weight '{entry.name}' of {source} must have shape {expected}, that "
                f"of '{entry.variable.path}'. Received: shape {array.shape}"
            )
    for entry in entries:
        array = _read(source, entry)
        entry.variable.assign(array.astype(entry.variable.dtype, copy=False))
    matched = {entry.name: entry.variable.path for entry in entries}
    set_variables = {id(entry.variable) for entry in entries}
    report = CheckpointReport(
        matched=matched,
        unused=tuple(
            name
            for name in (source.names if names is None else names)
            if name not in matched
        ),
        unset=tuple(
            variable.path
            for variable in model.weights
            if id(variable) not in set_variables and not is_seed(variable)
        ),
    )
    if report.unused or report.unset:
        warnings.warn(f"'{model.name}' from {source}: {report}", stacklevel=3)
    return report


def is_seed(variable) -> bool:
    """Whether a variable is the state of a random generator, which nobody stores."""
    return variable.path.endswith("seed_generator_state")


def _read(source, entry):
    array = source.read(entry.name)
    return array if entry.convert is None else entry.convert(array)


def _abbreviate(names, limit=8):
    shown = ", ".join(names[:limit])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > limit else shown
