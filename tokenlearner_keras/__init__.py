"""Learned tokens for vision models: TokenLearner, vector attention, TokenFuser."""

from tokenlearner_keras import layers, ops
from tokenlearner_keras.version import __version__

__all__ = ["__version__", "layers", "ops"]
