from tokenlearner_keras.models.vit import vit
from tokenlearner_keras.models.vit_config import ViTConfig
from tokenlearner_keras.models.vivit import vivit

__all__ = ["ViTConfig", "vit", "vivit"]
