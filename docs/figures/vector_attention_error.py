"""Draws vector_attention_error.png: error against terms, with the bound drawn in.

python docs/figures/vector_attention_error.py
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[2]))

import matplotlib
import numpy as np
from keras import ops

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from tokenlearner_keras.ops import _series, _tiles, vector_attention_error_bound

TOKENS, CHANNELS = 512, 8


def definition(q, k, v):
    """Returns the output by the definition, channel by channel."""
    logits = q[:, None] * k[None]
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return (weights * v).sum(1) / weights.sum(1)


def series(q, k, v, num_terms):
    """The forward pass of the package, without its checks."""
    q, k, v = (ops.convert_to_tensor(x[None].astype("float32")) for x in (q, k, v))
    frame, size = _series.frame(k, v, None), _series.size(num_terms)
    sums = _series.key_sums(_tiles.weighted_moments, k, v, None, frame, size)
    output = _series.outputs(q, sums, frame, size)[0] + frame.mean
    return ops.convert_to_numpy(output)[0]


def main():
    """Draws the figure."""
    rng = np.random.default_rng(0)
    figure, axis = plt.subplots(figsize=(7.5, 4.8))
    fitted = np.array([35, 40, 64])
    taylor = np.setdiff1d(np.arange(5, 72, 2), fitted)
    for index, scale in enumerate((0.5, 1.0, 1.4)):
        q, k, v = rng.standard_normal((3, TOKENS, CHANNELS))
        q, k = (np.float32(scale) * x.astype("float32") for x in (q, k))
        expected = definition(*(x.astype("float64") for x in (q, k, v)))
        z = (np.abs(q).max(0) * np.ptp(k, axis=0) / 2).max()
        w = (q[:, None] * (k - (k.max(0) + k.min(0)) / 2)[None]).astype("float64")
        cancellation = np.exp(np.abs(w)).sum(1) / np.exp(w).sum(1)
        cancellation = np.sqrt(np.mean(cancellation**2))
        spread = np.ptp(v, axis=0).max() / np.sqrt(np.mean(expected**2))

        def bound(num_terms, z=z, factor=cancellation, spread=spread):
            weights = vector_attention_error_bound(z, 2.0, int(num_terms)) * factor
            return weights / (1 - weights) * spread if weights < 0.9 else np.nan

        def error(num_terms, inputs=(q, k, v), expected=expected):
            difference = series(*inputs, int(num_terms)) - expected
            return np.linalg.norm(difference) / np.linalg.norm(expected)

        color = f"C{index}"
        label = f"q, k ~ {scale} N(0, 1), z = {z:.0f}"
        axis.semilogy(
            taylor,
            [error(p) for p in taylor],
            "o-",
            ms=3,
            color=color,
            label=f"error, {label}",
        )
        axis.semilogy(
            taylor, [bound(p) for p in taylor], "--", color=color, label="its bound"
        )
        axis.semilogy(fitted, [error(p) for p in fitted], "*", ms=10, color=color)
        axis.semilogy(
            fitted, [bound(p) for p in fitted], "_", ms=12, mew=2, color=color
        )
    axis.axhline(2.0**-23, color="k", lw=0.8, label="spacing of float32 at 1")
    axis.set_ylim(1e-9, 30)
    axis.set_xlabel("terms P (lines: Taylor; stars and bars: the fitted 35, 40 and 64)")
    axis.set_ylabel("relative 2-norm error of the output")
    axis.legend(fontsize=8)
    axis.grid(True, which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
