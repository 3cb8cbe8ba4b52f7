from tokenlearner_keras.models.space_time_module import space_time_module
from tokenlearner_keras.models.vit import vit
from tokenlearner_keras.models.vit_config import ViTConfig
from tokenlearner_keras.models.vivit import vivit
from tokenlearner_keras.models.x2plus1d import x2plus1d
from tokenlearner_keras.models.x2plus1d_config import X2Plus1DConfig

__all__ = [
    "ViTConfig",
    "X2Plus1DConfig",
    "space_time_module",
    "vit",
    "vivit",
    "x2plus1d",
]
