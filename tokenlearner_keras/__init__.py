"""Learned tokens for vision models: TokenLearner, vector attention, TokenFuser."""

from tokenlearner_keras import (
    checkpoints,
    data,
    evaluation,
    export,
    layers,
    models,
    ops,
    training,
    visualization,
)
from tokenlearner_keras.flops import FlopsReport, count_flops, print_flops
from tokenlearner_keras.insertion import (
    insert_token_learner,
    insertion_places,
    remove_token_learner,
)
from tokenlearner_keras.version import __version__

__all__ = [
    "FlopsReport",
    "__version__",
    "checkpoints",
    "count_flops",
    "data",
    "evaluation",
    "export",
    "insert_token_learner",
    "insertion_places",
    "layers",
    "models",
    "ops",
    "print_flops",
    "remove_token_learner",
    "training",
    "visualization",
]
