from tokenlearner_keras.training.checkpointing import (
    NonFiniteLossError,
    TrainingState,
    WorkerLostError,
    train,
)
from tokenlearner_keras.training.distillation import distill_token_learner
from tokenlearner_keras.training.distributed import distributed
from tokenlearner_keras.training.fine_tuning import TransferReport, transfer_weights
from tokenlearner_keras.training.pipeline import (
    DataWait,
    distribute_dataset,
    make_pipeline,
)
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
    "DataWait",
    "NonFiniteLossError",
    "Recipe",
    "TrainingState",
    "TransferReport",
    "WorkerLostError",
    "distill_token_learner",
    "distribute_dataset",
    "distributed",
    "get_strategy",
    "global_batch_size",
    "make_loss",
    "make_optimizer",
    "make_pipeline",
    "make_schedule",
    "train",
    "transfer_weights",
]
