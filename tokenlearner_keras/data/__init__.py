from tokenlearner_keras.data.images import (
    ImageDataset,
    image_augmentation,
    load_image_dataset,
    preprocess_images,
)

__all__ = [
    "ImageDataset",
    "image_augmentation",
    "load_image_dataset",
    "preprocess_images",
]
