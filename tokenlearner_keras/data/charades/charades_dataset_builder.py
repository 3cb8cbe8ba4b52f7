"""TFDS builder of Charades, from the published files on disk.

Run `tfds build --manual_dir=<folder>` in this folder, or
`Builder(config="12fps").download_and_prepare(...)`.
"""

import dataclasses

import numpy as np
import tensorflow_datasets as tfds

from tokenlearner_keras.data.charades.annotations import (
    NUM_CLASSES,
    read_charades,
    read_charades_classes,
)
from tokenlearner_keras.data.tfds_videos import find_manual, stored_examples
from tokenlearner_keras.data.videos import VideoFaults

VIDEO_FOLDERS = ("Charades_v1_480", "Charades_v1", "videos")


@dataclasses.dataclass
class CharadesConfig(tfds.core.BuilderConfig):
    """At which rate and size frames are stored.

    Args:
        fps: Frames a second. The paper uses 6 and 12.
        short_side: Pixels of the shorter side of a frame.
    """

    fps: float = 12.0
    short_side: int = 256


class Builder(tfds.core.GeneratorBasedBuilder):
    """Charades: 157 indoor activities with their times, several to a video."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (the name and the form are TFDS's)
        CharadesConfig(name="12fps", fps=12.0, description="12 frames a second."),
        CharadesConfig(name="6fps", fps=6.0, description="6 frames a second."),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    `manual_dir` holds `Charades_v1_train.csv`, `Charades_v1_test.csv`,
    `Charades_v1_classes.txt` and the folder `Charades_v1_480` (or `Charades_v1`, or
    `videos`) of `.mp4` files.
    """

    def _info(self):
        label = tfds.features.ClassLabel(num_classes=NUM_CLASSES)
        features = {
            "id": tfds.features.Text(),
            "video": tfds.features.Video(
                shape=(None, None, None, 3), encoding_format="jpeg"
            ),
            "duration": tfds.features.Scalar(np.float32),
            "labels": tfds.features.Tensor(shape=(NUM_CLASSES,), dtype=np.uint8),
            "actions": tfds.features.Sequence(
                {"label": label, "start": np.float32, "end": np.float32}
            ),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Videos of daily activities at home, 157 classes, with times.",
            features=tfds.features.FeaturesDict(features),
            homepage="https://prior.allenai.org/projects/charades",
            citation="Sigurdsson et al., Hollywood in Homes, ECCV 2016.",
            metadata=tfds.core.MetadataDict(fps=self.builder_config.fps),
        )

    def _split_generators(self, dl_manager):
        folder = dl_manager.manual_dir
        classes = find_manual(folder, ["Charades_v1_classes.txt"], "the class names")
        names = read_charades_classes(classes)
        self.info.features["actions"]["label"].names = names
        videos = find_manual(folder, VIDEO_FOLDERS, "the videos")
        self.faults = VideoFaults()
        # Both read before the first video is decoded, so that a wrong label shows now.
        records = {
            split: read_charades(
                find_manual(folder, [f"Charades_v1_{split}.csv"], "the annotations"),
                videos,
                self.faults,
            )
            for split in ("train", "test")
        }
        return {split: self._generate_examples(r) for split, r in records.items()}

    def _generate_examples(self, records):
        config = self.builder_config
        for key, record, features in stored_examples(
            records, config.fps, config.short_side, self.faults
        ):
            features["labels"] = record.targets(NUM_CLASSES).astype("uint8")
            features["actions"] = [
                {"label": label, "start": start, "end": end}
                for label, (start, end) in zip(
                    record.labels, record.spans or (), strict=True
                )
            ]
            yield key, features
