"""What the TFDS builders of videos share: files in, frames as JPEG out."""

import logging
import os
from collections.abc import Iterator, Sequence

from tokenlearner_keras.data.video_records import VideoRecord
from tokenlearner_keras.data.videos import VideoFaults, VideoReadError, read_video

logger = logging.getLogger("tokenlearner_keras")


def find_manual(manual_dir, names: Sequence[str], what: str) -> str:
    """Returns the first of `names` that there is in the folder of the user's files.

    Args:
        manual_dir: The folder (`tfds build --manual_dir`).
        names: File or folder names, the likeliest first.
        what: What is looked for, for the error.

    Raises:
        ValueError: if there is none of them.
    """
    for name in names:
        path = os.path.join(os.fspath(manual_dir), name)
        if os.path.exists(path):
            return path
    raise ValueError(
        f"`manual_dir` must hold {what}: one of {tuple(names)}. "
        f"Received: manual_dir='{manual_dir}'"
    )


def stored_examples(
    records: Sequence[VideoRecord],
    fps: float,
    short_side: int,
    faults: VideoFaults,
) -> Iterator[tuple[str, VideoRecord, dict]]:
    """Decodes each video, at one rate and size, for a TFDS builder to store.

    A file that cannot be read is left out, a damaged one is stored as far as it goes;
    both are logged with their names, and the count at the end.

    Yields:
        The file's name, its record, and the features `"id"`, `"video"` (`uint8`, time
        × height × width × 3) and `"duration"` (seconds).
    """
    stored = 0
    for record in records:
        name = os.path.basename(record.path)
        try:
            video = read_video(record.path, fps=fps, short_side=short_side)
        except VideoReadError as error:
            faults.add(error.path, error.kind, error.detail)
            continue
        if video.fault:
            faults.add(record.path, *video.fault.split(": ", 1))
        stored += 1
        features = {
            "id": os.path.splitext(name)[0],
            "video": video.frames,
            "duration": len(video.frames) / fps,
        }
        yield name, record, features
    level = logging.WARNING if faults.files else logging.INFO
    logger.log(level, "%d videos stored; %s", stored, faults.summary())
