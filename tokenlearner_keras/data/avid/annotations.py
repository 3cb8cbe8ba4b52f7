"""AViD's published annotation files."""

import json
import os
from collections.abc import Sequence

from tokenlearner_keras.data.video_records import VideoRecord
from tokenlearner_keras.data.videos import VideoFaults

NUM_CLASSES = 887
# What the annotations call a video without a class.
NO_LABEL = "none"


def read_avid(
    json_path,
    folder,
    class_names: Sequence[str],
    faults: VideoFaults | None = None,
) -> list[VideoRecord]:
    """Reads `avid_train.json` or `avid_val.json`.

    Each is one object, from the name of a file to the name of its class:
    `{"yrpxojhg.mp4": "playing harmonica"}`.

    Args:
        json_path: The JSON file.
        folder: Folder of the video files.
        class_names: Names of the classes, in order; see `read_avid_classes`. Videos
            that are labelled `"none"` are left out if that is not among them.
        faults: Where entries that name no file are counted. `None` only logs them.

    Returns:
        A record with one label for each entry that names a file.

    Raises:
        ValueError: if the file has another form, a class is unknown, or no entry names
            a file.
    """
    folder = os.fspath(folder)
    faults = VideoFaults() if faults is None else faults
    numbers = {name: index for index, name in enumerate(class_names)}
    records, missing = [], 0
    entries = _load(json_path)
    for name, label in entries.items():
        if label == NO_LABEL and label not in numbers:
            continue
        if label not in numbers:
            raise ValueError(
                f"Unknown class of '{name}' in '{os.fspath(json_path)}': expected one "
                f"of {len(numbers)} class names. Received: '{label}'"
            )
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            missing += 1
            faults.add(path, "missing", f"named by '{os.fspath(json_path)}'")
            continue
        records.append(VideoRecord(path, (numbers[label],)))
    if not records:
        raise ValueError(
            f"'{os.fspath(json_path)}' names no file that exists. Received: {missing} "
            f"entries with a class, with folder='{folder}'"
        )
    return records


def read_avid_classes(*json_paths) -> list[str]:
    """Names of AViD's classes: all in its annotation files, sorted.

    Args:
        *json_paths: `avid_train.json` and `avid_val.json`; a class may be in one only.

    Returns:
        At most 887 names. `"none"` counts as a class only while there is room for it.

    Raises:
        ValueError: if a file has another form, or there are more than 887 classes.
    """
    names = {label for path in json_paths for label in _load(path).values()}
    if len(names) > NUM_CLASSES:
        names.discard(NO_LABEL)
    if len(names) > NUM_CLASSES:
        raise ValueError(
            f"AViD has {NUM_CLASSES} classes. Received: {len(names)} names in "
            f"{[os.fspath(path) for path in json_paths]}"
        )
    return sorted(names)


def _load(path):
    path = os.fspath(path)
    with open(path, encoding="utf-8-sig") as file:
        try:
            entries = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"'{path}' must be JSON. Received: {error}") from None
    is_right = isinstance(entries, dict) and all(
        isinstance(label, str) for label in entries.values()
    )
    if not is_right:
        raise ValueError(
            f"'{path}' must be one JSON object from file names to class names. "
            f"Received: {type(entries).__name__}"
        )
    return entries
