from tokenlearner_keras.checkpoints.position_embeddings import (
    resize_position_embeddings,
)
from tokenlearner_keras.checkpoints.report import CheckpointReport
from tokenlearner_keras.checkpoints.scenic import load_scenic
from tokenlearner_keras.checkpoints.vit_npz import load_vit_npz, save_vit_npz

__all__ = [
    "CheckpointReport",
    "load_scenic",
    "load_vit_npz",
    "resize_position_embeddings",
    "save_vit_npz",
]
