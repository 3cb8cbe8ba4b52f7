from collections.abc import Iterable, Sequence
from typing import NamedTuple

import keras
import numpy as np

from tokenlearner_keras.evaluation.merge_clips import merge_clips
from tokenlearner_keras.evaluation.per_class import PerClassReport, per_class_report


class VideoScores(NamedTuple):
    """Scores of videos, one row a video.

    Attributes:
        videos: Which video each row is of, of shape `(videos,)`, ascending.
        labels: Of shape `(videos, classes)` or, single-label, `(videos,)`.
        scores: Of shape `(videos, classes)`.
    """

    videos: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


def score_videos(
    model: keras.Model,
    segments: Iterable[dict],
    method: str = "max",
    from_logits: bool = True,
    merge: str = "scores",
    activation: str = "sigmoid",
) -> VideoScores:
    """Runs a model over the segments of videos and merges what it says of each video.

    Args:
        model: A model from clips to logits or scores `(batch, classes)`.
        segments: Batches `{"clips", "labels", "videos"}`, such as a dataset of
            `tokenlearner_keras.data.evaluation_segments`.
        method: `"max"` or `"mean"`, see `merge_clips`, as the next arguments.
        from_logits: bool. Whether the model's outputs are logits.
        merge: `"scores"` or `"logits"`.
        activation: `"sigmoid"` or `"softmax"`.

    Returns:
        `VideoScores`.

    Raises:
        ValueError: if there is no segment.
    """
    outputs, videos, labels = [], [], []
    for batch in segments:
        outputs.append(np.asarray(model.predict_on_batch(batch["clips"]), "float32"))
        videos.append(np.asarray(batch["videos"]))
        labels.append(np.asarray(batch["labels"]))
    if not outputs:
        raise ValueError("Argument `segments` must have a batch. Received: none")
    videos = np.concatenate(videos)
    scores = merge_clips(
        np.concatenate(outputs), videos, method, from_logits, merge, activation
    )
    # The rows of `scores` are in the order of the unique numbers.
    unique, first = np.unique(videos, return_index=True)
    return VideoScores(unique, np.concatenate(labels)[first], scores)


def evaluate_videos(
    model: keras.Model,
    segments: Iterable[dict],
    class_names: Sequence[str] | None = None,
    **kwargs,
) -> PerClassReport:
    """Average precision of each class over whole videos (the paper, section 5.1).

    Args:
        model: As in `score_videos`.
        segments: As in `score_videos`; labels may be zeros and ones or one number.
        class_names: Names of the classes, for the report.
        **kwargs: Further arguments of `score_videos`.

    Returns:
        A `PerClassReport`; `report.mean()` is the mean average precision.
    """
    _, labels, scores = score_videos(model, segments, **kwargs)
    if labels.ndim == 1:
        labels = np.eye(scores.shape[1])[labels]
    return per_class_report(labels, scores, class_names)
