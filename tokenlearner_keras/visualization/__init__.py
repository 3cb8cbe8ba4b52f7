"""What each learned token looks at: pictures, clips and measures of attention maps."""

from tokenlearner_keras.visualization.animations import (
    attention_animation,
    save_animation,
)
from tokenlearner_keras.visualization.callback import AttentionMapsCallback
from tokenlearner_keras.visualization.maps import (
    AttentionMaps,
    attention_maps,
    attention_model,
    attention_tensors,
)
from tokenlearner_keras.visualization.pictures import (
    attention_figure,
    attention_grid,
    attention_overlay,
)
from tokenlearner_keras.visualization.token_metrics import (
    TokenEntropy,
    TokenOverlap,
    TokenStatistics,
    token_entropy,
    token_overlap,
    token_statistics,
)

__all__ = [
    "AttentionMaps",
    "AttentionMapsCallback",
    "TokenEntropy",
    "TokenOverlap",
    "TokenStatistics",
    "attention_animation",
    "attention_figure",
    "attention_grid",
    "attention_maps",
    "attention_model",
    "attention_overlay",
    "attention_tensors",
    "save_animation",
    "token_entropy",
    "token_overlap",
    "token_statistics",
]
