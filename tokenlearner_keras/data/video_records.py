"""Which videos there are and what is in them: class folders and CSV files."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokenlearner_keras.data.videos import VideoFaults

VIDEO_EXTENSIONS = (
    *(".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"),
)


@dataclass(frozen=True)
class VideoRecord:
    """A video file and its classes.

    Attributes:
        path: The file.
        labels: Class numbers; several for a multi-label video, or none at all.
        spans: `None`, if the labels hold for the whole video, or the start and the end
            in seconds of each label.
    """

    path: str
    labels: tuple[int, ...]
    spans: tuple[tuple[float, float], ...] | None = None

    def targets(
        self, num_classes: int, start: float | None = None, end: float | None = None
    ) -> np.ndarray:
        """Zeros and ones of shape `(num_classes,)`.

        With `start` and `end` (seconds), only of the labels that overlap that time.
        """
        targets = np.zeros(num_classes, "float32")
        for index, label in enumerate(self.labels):
            if self.spans is not None and start is not None:
                first, last = self.spans[index]
                if last < start or first > end:
                    continue
            targets[label] = 1
        return targets


def check_records(
    records: Sequence[VideoRecord], num_classes: int, multi_label: bool
) -> list[VideoRecord]:
    """Returns the records if their labels are in range, else raises `ValueError`."""
    records = list(records)
    if not records:
        raise ValueError(
            "Argument `records` must hold at least one video. Received: none"
        )
    bad = [
        record
        for record in records
        if any(not 0 <= label < num_classes for label in record.labels)
    ]
    if bad:
        raise ValueError(
            f"Labels must be in [0, num_classes) with num_classes={num_classes}. "
            f"Received: labels {bad[0].labels} of '{bad[0].path}' "
            f"({len(bad)} of {len(records)} videos have labels out of range)"
        )
    if not multi_label:
        bad = [record for record in records if len(record.labels) != 1]
        if bad:
            raise ValueError(
                "With `multi_label=False` every video must have one label. Received: "
                f"labels {bad[0].labels} of '{bad[0].path}' ({len(bad)} of "
                f"{len(records)} videos have none or several)"
            )
    return records


def read_video_folder(
    folder, class_names: Sequence[str] | None = None
) -> tuple[list[VideoRecord], list[str]]:
    """Lists a folder that has a subfolder of videos for each class.

    Args:
        folder: The folder. Files that are not videos by their ending are passed over.
        class_names: Names of the classes, in order. `None` takes the names of the
            subfolders, sorted.

    Returns:
        The records, sorted by path, and the class names.

    Raises:
        ValueError: if there is no such folder, it has no class folder with a video, or
            a folder is not in `class_names`.
    """
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise ValueError(
            f"Argument `folder` must be a folder. Received: folder='{folder}'"
        )
    found = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    class_names = list(found if class_names is None else class_names)
    unknown = sorted(set(found) - set(class_names))
    if unknown:
        raise ValueError(
            f"Every subfolder of '{folder}' must be one of `class_names`. "
            f"Received: {unknown}, with class_names={class_names}"
        )
    records = []
    for label, name in enumerate(class_names):
        for parent, folders, files in os.walk(os.path.join(folder, name)):
            folders.sort()
            for file in sorted(files):
                if file.lower().endswith(VIDEO_EXTENSIONS):
                    records.append(VideoRecord(os.path.join(parent, file), (label,)))
    if not records:
        raise ValueError(
            f"'{folder}' must have a subfolder of videos for each class. Received: "
            f"{len(found)} subfolders and no file that ends in {VIDEO_EXTENSIONS}"
        )
    return records, class_names


def read_video_csv(
    csv_path,
    folder=None,
    class_names: Sequence[str] | None = None,
    faults: VideoFaults | None = None,
) -> tuple[list[VideoRecord], list[str]]:
    """Reads a CSV file of videos with any number of labels each.

    The columns are `path` and `labels` (names or numbers, with `;` between them), and
    optionally `start` and `end` in seconds, when the labels of the row hold. Rows of
    the same path are put together, so that each action may have a row of its own.

    Args:
        csv_path: The CSV file, with a header.
        folder: Folder that the paths start from. `None` takes the CSV file's own.
        class_names: Names of the classes, in order. `None` takes the names in the file,
            sorted; needed if the file has numbers.
        faults: Where rows that name no file are counted. `None` only logs them.

    Returns:
        The records, in the order of the file, and the class names.

    Raises:
        ValueError: if the file has not these columns, a label is unknown or out of
            range, a time is no number, or no row names a file that exists.
    """
    csv_path = os.fspath(csv_path)
    folder = os.path.dirname(csv_path) if folder is None else os.fspath(folder)
    faults = VideoFaults() if faults is None else faults
    if not os.path.isfile(csv_path):
        raise ValueError(
            f"Argument `csv_path` must be a file. Received: csv_path='{csv_path}'"
        )
    with open(csv_path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if not {"path", "labels"} <= set(columns):
            raise ValueError(
                f"'{csv_path}' must have the columns `path` and `labels`. "
                f"Received: {columns}"
            )
        rows = [(reader.line_num, row) for row in reader if (row["path"] or "").strip()]
    split = [
        [name.strip() for name in (row["labels"] or "").split(";") if name.strip()]
        for _, row in rows
    ]
    if class_names is None:
        class_names = sorted({name for names in split for name in names})
        if class_names and all(name.lstrip("-").isdigit() for name in class_names):
            raise ValueError(
                f"'{csv_path}' has numbers for labels: pass `class_names`, so that it "
                "is known how many classes there are."
            )
    class_names = list(class_names)
    numbers = {name: index for index, name in enumerate(class_names)}

    found, missing = {}, 0
    for (line, row), names in zip(rows, split, strict=True):
        path = os.path.join(folder, row["path"].strip())
        labels = [
            _class_number(name, numbers, f"'{csv_path}', line {line}") for name in names
        ]
        span = _span(row, f"'{csv_path}', line {line}")
        if not os.path.isfile(path):
            missing += 1
            faults.add(path, "missing", f"named by '{csv_path}', line {line}")
            continue
        found.setdefault(path, []).extend((label, span) for label in labels)
    if not found:
        raise ValueError(
            f"'{csv_path}' names no file that exists. Received: {missing} rows, with "
            f"folder='{folder}'"
        )
    return [_record(path, entries) for path, entries in found.items()], class_names


def _class_number(name, numbers, place):
    if name in numbers:
        return numbers[name]
    if name.isdigit() and int(name) < len(numbers):
        return int(name)
    raise ValueError(
        f"Unknown label in {place}: expected one of the {len(numbers)} class names or "
        f"a number from 0 to {len(numbers) - 1}. Received: '{name}'"
    )


def _span(row, place):
    texts = [(row.get(column) or "").strip() for column in ("start", "end")]
    if not any(texts):
        return None
    try:
        start, end = map(float, texts)
    except ValueError:
        start, end = 1.0, 0.0
    if not 0 <= start <= end:
        raise ValueError(
            f"`start` and `end` in {place} must be seconds with 0 <= start <= end. "
            f"Received: start='{texts[0]}', end='{texts[1]}'"
        )
    return start, end


def _record(path, entries):
    labels = tuple(label for label, _ in entries)
    if all(span is None for _, span in entries):
        return VideoRecord(path, tuple(dict.fromkeys(labels)))
    whole = (0.0, float("inf"))
    return VideoRecord(path, labels, tuple(span or whole for _, span in entries))
