"""Measures of attention maps: dead tokens and duplicate tokens."""

import dataclasses
import math

import keras
import numpy as np
from keras import ops

from tokenlearner_keras.layers._checks import check_choice, check_positive_int

ENTROPY_AVERAGES = (None, "mean", "min", "max")
OVERLAP_AVERAGES = (None, "mean", "max")


def token_entropy(maps, normalize: bool = True):
    """Entropy of attention maps: how widely each token looks.

    A map is divided by its sum, which makes it a distribution over the positions.
    A token with an entropy near 1 looks at everything alike: it is a plain mean, and
    dead as a learned token. A map that is zero everywhere counts as uniform.

    Args:
        maps: Tensor of shape `(..., num_tokens, height, width)` of values of at least
            0, as `attention_maps` returns.
        normalize: bool. Whether to divide by the largest entropy, `log(height * width)`
            nats, so that the values lie between 0 (one position) and 1 (uniform).

    Returns:
        float32 tensor of shape `(..., num_tokens)`.

    Raises:
        ValueError: for maps of fewer than 3 axes.

    Example:

    >>> maps = keras.ops.ones((1, 8, 7, 7))
    >>> float(token_entropy(maps)[0, 0])
    1.0
    """
    shares = _shares(maps)
    positions = shares.shape[-1]
    # x log x is 0 at 0.
    logs = ops.log(ops.where(shares > 0, shares, ops.ones_like(shares)))
    entropy = -ops.sum(shares * logs, axis=-1)
    if normalize:
        entropy = entropy / max(math.log(positions), 1e-30)
    return ops.maximum(entropy, 0.0)


def token_overlap(maps):
    """Overlap of every two attention maps of an example: which tokens are duplicates.

    Maps are divided by their sums; the overlap of two is the sum over the positions
    of the smaller of both values. It is the share of attention that the two tokens put
    on the same positions: 1 for equal maps, 0 for disjoint ones.

    Args:
        maps: Tensor of shape `(..., num_tokens, height, width)` of values of at least
            0, as `attention_maps` returns.

    Returns:
        float32 tensor of shape `(..., num_tokens, num_tokens)`, symmetric, with ones
        on the diagonal.

    Raises:
        ValueError: for maps of fewer than 3 axes.
    """
    shares = _shares(maps)
    smaller = ops.minimum(
        ops.expand_dims(shares, axis=-2), ops.expand_dims(shares, axis=-3)
    )
    return ops.minimum(ops.sum(smaller, axis=-1), 1.0)


@dataclasses.dataclass(frozen=True)
class TokenStatistics:
    """What `token_statistics` found, for each token over all examples and frames.

    Attributes:
        entropy: float32 array of shape `(num_tokens,)`, mean of `token_entropy`.
        overlap: float32 array of shape `(num_tokens, num_tokens)`, mean of
            `token_overlap`.
        change: float32 array of shape `(num_tokens,)`: how far the maps of single
            examples are from the token's mean map, as the share of the attention that
            would have to move. 0 for a token that looks at the same places whatever
            the input.
    """

    entropy: np.ndarray
    overlap: np.ndarray
    change: np.ndarray

    def dead(self, threshold: float = 0.99) -> list[int]:
        """Returns the tokens that look at all positions alike.

        Args:
            threshold: Lowest entropy of a dead token.

        Returns:
            Indices of the tokens whose mean entropy is at least `threshold`.
        """
        return [int(i) for i in np.flatnonzero(self.entropy >= threshold)]

    def duplicates(self, threshold: float = 0.95) -> list[tuple[int, int]]:
        """Returns the pairs of tokens that look at the same places.

        Args:
            threshold: Lowest overlap of duplicates.

        Returns:
            Pairs `(i, j)` of indices with `i < j` and a mean overlap of at least
            `threshold`.
        """
        pairs = np.argwhere(np.triu(self.overlap >= threshold, 1))
        return [(int(i), int(j)) for i, j in pairs]

    def __str__(self):
        lines = ["token  entropy  change  largest overlap"]
        others = np.where(np.eye(len(self.overlap)) > 0, -1.0, self.overlap)
        for token, (entropy, change) in enumerate(zip(self.entropy, self.change)):
            line = f"{token:5d}  {entropy:7.3f}  {change:6.3f}"
            if len(others) > 1:
                other = int(others[token].argmax())
                line += f"  {others[token, other]:.3f} (token {other})"
            lines.append(line)
        lines.append(f"dead: {self.dead() or 'none'}")
        lines.append(f"duplicates: {self.duplicates() or 'none'}")
        return "\n".join(lines)


def token_statistics(maps) -> TokenStatistics:
    """Measures the tokens of a model from their attention maps.

    Args:
        maps: Array of shape `(batch, num_tokens, height, width)` or
            `(batch, time, num_tokens, height, width)`, as `attention_maps` returns.

    Returns:
        A `TokenStatistics`; `print` shows it as a table.

    Raises:
        ValueError: for maps of another rank.

    Example:

    >>> maps = attention_maps(model, images)
    >>> print(token_statistics(maps))
    """
    maps = np.asarray(ops.convert_to_numpy(maps), "float32")
    if maps.ndim not in (4, 5):
        raise ValueError(
            "Argument `maps` must have the shape (batch, num_tokens, height, width) or "
            "(batch, time, num_tokens, height, width). Received: maps of shape "
            f"{maps.shape}"
        )
    maps = maps.reshape(-1, *maps.shape[-3:])
    shares = np.asarray(ops.convert_to_numpy(_shares(maps)))
    distance = np.abs(shares - shares.mean(axis=0)).sum(axis=-1) / 2
    return TokenStatistics(
        entropy=_mean_over_examples(token_entropy(maps)),
        # One example at a time: the pairs of many would not fit into memory.
        overlap=np.mean(
            [ops.convert_to_numpy(token_overlap(example)) for example in maps], axis=0
        ),
        change=distance.mean(axis=0),
    )


class _TokenMetric(keras.metrics.Metric):
    """The mean over examples of a value for each token or pair of tokens."""

    def __init__(self, num_tokens, average, averages, rank, name, dtype):
        super().__init__(name=name, dtype=dtype)
        self.num_tokens = check_positive_int("num_tokens", num_tokens)
        self.average = check_choice("average", average, averages)
        self.total = self.add_variable(
            (self.num_tokens,) * rank, initializer="zeros", name="total"
        )
        self.count = self.add_variable((), initializer="zeros", name="count")

    def _add(self, values, sample_weight):
        """Adds values of shape `(batch, ...)`, or `(batch, time, ...)` for clips."""
        values = ops.cast(values, self.dtype)
        rank = len(self.total.shape)
        if len(values.shape) == rank + 2:
            values = ops.mean(values, axis=1)
        if tuple(values.shape[1:]) != tuple(self.total.shape):
            raise ValueError(
                f"Metric '{self.name}' expects the maps of num_tokens="
                f"{self.num_tokens} tokens, of shape (batch, num_tokens, height, "
                "width) or (batch, time, num_tokens, height, width). Received: values "
                f"of shape {tuple(values.shape)} for each token"
            )
        weights = ops.ones_like(ops.reshape(values, (-1, self.num_tokens**rank))[:, 0])
        if sample_weight is not None:
            weights = weights * ops.cast(sample_weight, self.dtype)
        weighted = values * ops.reshape(weights, (-1, *(1,) * rank))
        self.total.assign(self.total + ops.sum(weighted, axis=0))
        self.count.assign(self.count + ops.sum(weights))

    def result(self):
        return self._reduce(ops.divide_no_nan(self.total, self.count))

    def get_config(self):
        config = super().get_config()
        config.update({"num_tokens": self.num_tokens, "average": self.average})
        return config


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class TokenEntropy(_TokenMetric):
    """Mean entropy of attention maps, between 0 and 1: see `token_entropy`.

    Args:
        num_tokens: int. Number of tokens that have maps.
        average: `"mean"` over the tokens; `"max"` and `"min"`: the value of the token
            that looks most widely, or most narrowly; `None`: one value a token.
        name: Name of the metric.
        dtype: Dtype of the result.

    Call arguments:
        maps: Tensor of shape `(batch, num_tokens, height, width)` or
            `(batch, time, num_tokens, height, width)`.
        sample_weight: Optional tensor of shape `(batch,)`.

    Output:
        Scalar, or with `average=None` a tensor of shape `(num_tokens,)`.

    Raises:
        ValueError: at construction for an argument out of range; at `update_state` for
            maps of another shape.

    Example:

    >>> metric = TokenEntropy(num_tokens=8, average="max")
    >>> metric.update_state(attention_maps(model, images))
    >>> float(metric.result())
    """

    def __init__(self, num_tokens, average="mean", name="token_entropy", dtype=None):
        super().__init__(num_tokens, average, ENTROPY_AVERAGES, 1, name, dtype)

    def update_state(self, maps, sample_weight=None):
        self._add(token_entropy(maps), sample_weight)

    def _reduce(self, values):
        if self.average is None:
            return values
        return {"mean": ops.mean, "min": ops.min, "max": ops.max}[self.average](values)


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class TokenOverlap(_TokenMetric):
    """Mean overlap of the attention maps of two tokens: see `token_overlap`.

    Args:
        num_tokens: int. Number of tokens that have maps.
        average: `"mean"` over the pairs of different tokens; `"max"`: the value of the
            pair that is most alike; `None`: one value a pair.
        name: Name of the metric.
        dtype: Dtype of the result.

    Call arguments:
        maps: Tensor of shape `(batch, num_tokens, height, width)` or
            `(batch, time, num_tokens, height, width)`.
        sample_weight: Optional tensor of shape `(batch,)`.

    Output:
        Scalar, 0 for a single token; or with `average=None` a tensor of shape
        `(num_tokens, num_tokens)`.

    Raises:
        ValueError: at construction for an argument out of range; at `update_state` for
            maps of another shape.
    """

    def __init__(self, num_tokens, average="mean", name="token_overlap", dtype=None):
        super().__init__(num_tokens, average, OVERLAP_AVERAGES, 2, name, dtype)

    def update_state(self, maps, sample_weight=None):
        self._add(token_overlap(maps), sample_weight)

    def _reduce(self, values):
        if self.average is None:
            return values
        between = values * (1 - ops.eye(self.num_tokens, dtype=values.dtype))
        if self.average == "max":
            return ops.max(between)
        pairs = self.num_tokens * (self.num_tokens - 1)
        return ops.sum(between) / max(pairs, 1)


def _shares(maps):
    """Maps as distributions over flattened positions, in float32."""
    maps = ops.cast(maps, "float32")
    shape = maps.shape
    if len(shape) < 3:
        raise ValueError(
            "Argument `maps` must have the shape (..., num_tokens, height, width). "
            f"Received: maps of shape {tuple(shape)}"
        )
    positions = shape[-2] * shape[-1]
    # Symbolic batch sizes are `None`.
    leading = ops.shape(maps)[:-2]
    maps = ops.reshape(maps, (*leading, positions))
    total = ops.sum(maps, axis=-1, keepdims=True)
    uniform = ops.full_like(maps, 1 / positions)
    return ops.where(total > 0, maps / ops.where(total > 0, total, 1.0), uniform)


def _mean_over_examples(values):
    return np.asarray(ops.convert_to_numpy(ops.mean(values, axis=0)))
