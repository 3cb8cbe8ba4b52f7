import keras
import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import average_precision_score

from tokenlearner_keras.evaluation import evaluate_videos, score_videos


def make_segments(single=False):
    """Seven segments of three videos, in batches of four; clips hold the logits."""
    rng = np.random.default_rng(0)
    videos = np.array([2, 0, 0, 1, 2, 2, 1])
    labels = np.array([[1, 0], [0, 1], [1, 0]], "float32")[videos]
    if single:
        labels = labels.argmax(axis=1)
    clips = rng.standard_normal((7, 2)).astype("float32")
    batches = [
        {"clips": clips[s], "labels": labels[s], "videos": videos[s]}
        for s in (slice(0, 4), slice(4, 7))
    ]
    return batches, clips, videos


@pytest.fixture
def model():
    return keras.Sequential([keras.Input((2,)), keras.layers.Identity()])


@pytest.mark.parametrize("method", ["max", "mean"])
def test_scores_of_whole_videos(method, model):
    batches, clips, videos = make_segments()
    result = score_videos(model, batches, method=method)
    reduce = np.max if method == "max" else np.mean
    expected = [reduce(expit(clips[videos == v]), axis=0) for v in range(3)]
    np.testing.assert_allclose(result.scores, expected, rtol=1e-6)
    assert result.videos.tolist() == [0, 1, 2]
    assert result.labels.tolist() == [[1, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize("single", [False, True])
def test_report(single, model):
    batches, _, _ = make_segments(single)
    report = evaluate_videos(model, batches, ["sit", "stand"])
    scores = score_videos(model, batches).scores
    labels = np.array([[1, 0], [0, 1], [1, 0]])
    expected = average_precision_score(labels, scores, average=None)
    np.testing.assert_allclose(report.average_precision, expected)
    assert report.num_examples == 3
    assert report.class_names == ("sit", "stand")


def test_no_segment(model):
    with pytest.raises(ValueError, match="must have a batch"):
        score_videos(model, [])
