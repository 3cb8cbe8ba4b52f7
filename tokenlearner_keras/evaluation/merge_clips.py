import numpy as np

from tokenlearner_keras.layers._checks import check_choice

METHODS = {"max": np.maximum, "mean": np.add}
SPACES = ("scores", "logits")
ACTIVATIONS = ("sigmoid", "softmax")


def merge_clips(
    outputs,
    video_ids=None,
    method: str = "max",
    from_logits: bool = False,
    merge: str = "scores",
    activation: str = "sigmoid",
) -> np.ndarray:
    """Merges a model's outputs for the clips of each video into one row a video.

    The paper evaluates 64-frame segments "by merging their output responses"
    (appendix A.2) and does not say how. Published Charades evaluations take the
    maximum of the scores, which is the default; the mean is common where a video has
    one label.

    Args:
        outputs: Array of shape `(videos, clips, classes)`, or, with `video_ids`, of
            shape `(clips, classes)`; a video may then have any number of clips.
        video_ids: Array of shape `(clips,)`, integers or strings: whose clip each row
            is. In any order.
        method: `"max"` or `"mean"`.
        from_logits: bool. Whether `outputs` are logits. Otherwise they are scores.
        merge: `"scores"` (the activation first) or `"logits"` (the activation last;
            needs `from_logits=True`). For `"max"` with a sigmoid both are the same.
        activation: `"sigmoid"` or `"softmax"`; turns logits into scores.

    Returns:
        Float array of shape `(videos, classes)`, scores. With `video_ids` the rows
        are in the order of `numpy.unique(video_ids)`.

    Raises:
        ValueError: if an argument is not one of its choices, shapes do not fit, there
            is no clip, or an output is not a number.
    """
    check_choice("method", method, tuple(METHODS))
    check_choice("merge", merge, SPACES)
    check_choice("activation", activation, ACTIVATIONS)
    if merge == "logits" and not from_logits:
        raise ValueError(
            "Argument `merge='logits'` needs logits: pass the model's logits with "
            "`from_logits=True`. Received: from_logits=False"
        )
    outputs = np.asarray(outputs)
    outputs = outputs.astype(np.result_type(outputs.dtype, np.float32))
    rank = 3 if video_ids is None else 2
    if outputs.ndim != rank or 0 in outputs.shape:
        shape = "(videos, clips, classes)" if rank == 3 else "(clips, classes)"
        raise ValueError(
            f"Argument `outputs` must have shape {shape}, with at least one of each, "
            f"{'without' if rank == 3 else 'with'} `video_ids`. "
            f"Received: shape {outputs.shape}"
        )
    if np.isnan(outputs).any():
        raise ValueError(
            "Argument `outputs` must be numbers. Received: "
            f"{int(np.isnan(outputs).sum())} nan of {outputs.size}"
        )
    if video_ids is None:
        num_videos, num_clips = outputs.shape[:2]
        rows = np.repeat(np.arange(num_videos), num_clips)
        outputs = outputs.reshape(-1, outputs.shape[-1])
    else:
        video_ids = np.asarray(video_ids)
        if video_ids.shape != outputs.shape[:1]:
            raise ValueError(
                "Argument `video_ids` must have one entry a row of `outputs`. "
                f"Received: shape {video_ids.shape} for {len(outputs)} rows"
            )
        unique, rows = np.unique(video_ids, return_inverse=True)
        rows, num_videos = rows.reshape(-1), len(unique)

    if from_logits and merge == "scores":
        outputs = _activate(outputs, activation)
    ufunc = METHODS[method]
    start = -np.inf if method == "max" else 0.0
    merged = np.full((num_videos, outputs.shape[-1]), start, outputs.dtype)
    ufunc.at(merged, rows, outputs)
    if method == "mean":
        counts = np.bincount(rows, minlength=num_videos).astype(outputs.dtype)
        merged /= counts[:, None]
    if from_logits and merge == "logits":
        merged = _activate(merged, activation)
    return merged


def _activate(logits, activation):
    from scipy.special import expit, softmax

    return expit(logits) if activation == "sigmoid" else softmax(logits, axis=-1)
