from tokenlearner_keras.data.avid.annotations import (
    NUM_CLASSES,
    read_avid,
    read_avid_classes,
)

__all__ = ["NUM_CLASSES", "read_avid", "read_avid_classes"]
