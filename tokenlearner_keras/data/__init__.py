from tokenlearner_keras.data.clips import clip_indices, segment_starts
from tokenlearner_keras.data.images import (
    ImageDataset,
    image_augmentation,
    load_image_dataset,
    preprocess_images,
)
from tokenlearner_keras.data.stored_videos import (
    stored_evaluation_segments,
    stored_training_clips,
)
from tokenlearner_keras.data.video_dataset import evaluation_segments, training_clips
from tokenlearner_keras.data.video_records import (
    VideoRecord,
    read_video_csv,
    read_video_folder,
)
from tokenlearner_keras.data.videos import VideoFaults, VideoReadError, read_video

__all__ = [
    "ImageDataset",
    "VideoFaults",
    "VideoReadError",
    "VideoRecord",
    "clip_indices",
    "evaluation_segments",
    "image_augmentation",
    "load_image_dataset",
    "preprocess_images",
    "read_video",
    "read_video_csv",
    "read_video_folder",
    "segment_starts",
    "stored_evaluation_segments",
    "stored_training_clips",
    "training_clips",
]
