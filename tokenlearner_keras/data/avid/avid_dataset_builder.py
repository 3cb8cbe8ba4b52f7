"""TFDS builder of AViD, from the published files on disk.

Run `tfds build --manual_dir=<folder>` in this folder, or
`Builder(config="12fps").download_and_prepare(...)`.
"""

import dataclasses
import os

import numpy as np
import tensorflow_datasets as tfds

from tokenlearner_keras.data.avid.annotations import (
    NUM_CLASSES,
    read_avid,
    read_avid_classes,
)
from tokenlearner_keras.data.tfds_videos import find_manual, stored_examples
from tokenlearner_keras.data.videos import VideoFaults

VIDEO_FOLDERS = ("AViD_small", "AViD_full", "AViD", "videos")


@dataclasses.dataclass
class AvidConfig(tfds.core.BuilderConfig):
    """At which rate and size frames are stored.

    Args:
        fps: Frames a second. The paper does not give AViD's.
        short_side: Pixels of the shorter side of a frame.
    """

    fps: float = 12.0
    short_side: int = 256


class Builder(tfds.core.GeneratorBasedBuilder):
    """AViD: 887 actions, one to a video, from all over the world."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (the name and the form are TFDS's)
        AvidConfig(name="12fps", fps=12.0, description="12 frames a second."),
        AvidConfig(name="25fps", fps=25.0, description="25 frames a second."),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    `manual_dir` holds `avid_train.json`, `avid_val.json`, the folder `AViD_small` (or
    `AViD_full`, `AViD`, `videos`) of video files and, if other names or another order
    are wanted than all names in the JSON files, sorted, `classes.txt` with one a line.
    """

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="Videos of actions from many countries, 887 classes.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "video": tfds.features.Video(
                        shape=(None, None, None, 3), encoding_format="jpeg"
                    ),
                    "duration": tfds.features.Scalar(np.float32),
                    "label": tfds.features.ClassLabel(num_classes=NUM_CLASSES),
                }
            ),
            homepage="https://github.com/piergiaj/AViD",
            citation="Piergiovanni and Ryoo, AViD Dataset, NeurIPS 2020.",
            metadata=tfds.core.MetadataDict(fps=self.builder_config.fps),
        )

    def _split_generators(self, dl_manager):
        folder = dl_manager.manual_dir
        paths = {
            split: find_manual(folder, [f"avid_{name}.json"], "the annotations")
            for split, name in (("train", "train"), ("test", "val"))
        }
        names = self._class_names(folder, paths.values())
        # A part of the set may lack classes: the numbers stay within 887.
        unused = [f"unused {index}" for index in range(len(names), NUM_CLASSES)]
        self.info.features["label"].names = names + unused
        videos = find_manual(folder, VIDEO_FOLDERS, "the videos")
        self.faults = VideoFaults()
        records = {
            split: read_avid(path, videos, names, self.faults)
            for split, path in paths.items()
        }
        return {split: self._generate_examples(r) for split, r in records.items()}

    def _class_names(self, folder, json_paths):
        path = os.path.join(os.fspath(folder), "classes.txt")
        if not os.path.isfile(path):
            return read_avid_classes(*json_paths)
        with open(path, encoding="utf-8-sig") as file:
            names = [line.strip() for line in file if line.strip()]
        if len(names) > NUM_CLASSES or len(set(names)) < len(names):
            raise ValueError(
                f"'{path}' must hold up to {NUM_CLASSES} different names. Received: "
                f"{len(names)} names, {len(set(names))} different"
            )
        return names

    def _generate_examples(self, records):
        config = self.builder_config
        for key, record, features in stored_examples(
            records, config.fps, config.short_side, self.faults
        ):
            features["label"] = record.labels[0]
            yield key, features
