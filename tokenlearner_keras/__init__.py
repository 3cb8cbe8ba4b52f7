"""Learned tokens for vision models: TokenLearner, vector attention, TokenFuser."""

from tokenlearner_keras import checkpoints, layers, models, ops
from tokenlearner_keras.version import __version__

__all__ = ["__version__", "checkpoints", "layers", "models", "ops"]
