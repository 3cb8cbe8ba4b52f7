"""Charades' published annotation files."""

import csv
import os

from tokenlearner_keras.data.video_records import VideoRecord
from tokenlearner_keras.data.videos import VideoFaults

NUM_CLASSES = 157


def read_charades(
    csv_path, folder, faults: VideoFaults | None = None
) -> list[VideoRecord]:
    """Reads `Charades_v1_train.csv` or `Charades_v1_test.csv`.

    Its `id` column names the file `<id>.mp4`, its `actions` column holds the class, the
    start and the end in seconds of each action: `c092 11.90 21.20;c147 0.00 12.60`.

    Args:
        csv_path: The CSV file.
        folder: Folder of the `.mp4` files.
        faults: Where rows that name no file are counted. `None` only logs them.

    Returns:
        A record for each row that names a file, with the times of its labels.

    Raises:
        ValueError: if the file has not these columns, an action has another form, its
            class is out of range, or no row names a file.
    """
    csv_path, folder = os.fspath(csv_path), os.fspath(folder)
    faults = VideoFaults() if faults is None else faults
    records, missing = [], 0
    with open(csv_path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if not {"id", "actions"} <= set(columns):
            raise ValueError(
                f"'{csv_path}' must have the columns `id` and `actions`. "
                f"Received: {columns}"
            )
        for row in reader:
            place = f"'{csv_path}', line {reader.line_num}"
            actions = [
                _parse(action, f"{place}, video '{row['id']}'")
                for action in (row["actions"] or "").split(";")
                if action.strip()
            ]
            path = os.path.join(folder, f"{row['id']}.mp4")
            if not os.path.isfile(path):
                missing += 1
                faults.add(path, "missing", f"named by {place}")
                continue
            labels = tuple(label for label, _, _ in actions)
            spans = tuple((start, end) for _, start, end in actions)
            records.append(VideoRecord(path, labels, spans))
    if not records:
        raise ValueError(
            f"'{csv_path}' names no file that exists. Received: {missing} rows, with "
            f"folder='{folder}'"
        )
    return records


def read_charades_classes(path) -> list[str]:
    """Reads `Charades_v1_classes.txt`: `c000 Holding some clothes` and so on.

    Args:
        path: The file.

    Returns:
        The 157 names, in order.

    Raises:
        ValueError: if a line is out of order, or there are not 157.
    """
    names = []
    with open(path, encoding="utf-8-sig") as file:
        for line in filter(str.strip, file):
            code, _, name = line.strip().partition(" ")
            if code != f"c{len(names):03d}" or not name:
                raise ValueError(
                    f"Line {len(names) + 1} of '{path}' must be "
                    f"'c{len(names):03d} <name>'. Received: '{line.strip()}'"
                )
            names.append(name)
    if len(names) != NUM_CLASSES:
        raise ValueError(
            f"'{path}' must name {NUM_CLASSES} classes. Received: {len(names)}"
        )
    return names


def _parse(action, place):
    parts = action.split()
    try:
        (code, start, end) = parts
        label, start, end = int(code.removeprefix("c")), float(start), float(end)
    except ValueError:
        raise ValueError(
            f"An action in {place} must be '<class> <start> <end>', such as "
            f"'c092 11.90 21.20'. Received: '{action}'"
        ) from None
    if not 0 <= label < NUM_CLASSES:
        raise ValueError(
            f"The class of an action in {place} must be from c000 to "
            f"c{NUM_CLASSES - 1}. Received: '{action}'"
        )
    # The times of an action count in either order.
    return label, min(start, end), max(start, end)
