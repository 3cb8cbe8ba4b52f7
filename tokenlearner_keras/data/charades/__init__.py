from tokenlearner_keras.data.charades.annotations import (
    NUM_CLASSES,
    read_charades,
    read_charades_classes,
)

__all__ = ["NUM_CLASSES", "read_charades", "read_charades_classes"]
