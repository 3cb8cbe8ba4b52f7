"""Learned tokens for vision models: TokenLearner, vector attention, TokenFuser."""

from tokenlearner_keras import layers
from tokenlearner_keras.version import __version__

__all__ = ["__version__", "layers"]
