from tokenlearner_keras.training.distributed import distributed
from tokenlearner_keras.training.recipes import (
    AVID,
    CHARADES,
    RECIPES,
    VIT_FINE_TUNING,
    Recipe,
    global_batch_size,
    make_loss,
    make_optimizer,
    make_schedule,
)
from tokenlearner_keras.training.strategies import get_strategy

__all__ = [
    "AVID",
    "CHARADES",
    "RECIPES",
    "VIT_FINE_TUNING",
    "Recipe",
    "distributed",
    "get_strategy",
    "global_batch_size",
    "make_loss",
    "make_optimizer",
    "make_schedule",
]
