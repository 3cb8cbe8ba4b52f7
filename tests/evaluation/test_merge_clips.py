import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax

from tokenlearner_keras.evaluation import merge_clips


def test_max_and_mean_of_scores():
    outputs = np.array([[[0.1, 0.8], [0.5, 0.2]], [[0.3, 0.3], [0.9, 0.1]]])
    np.testing.assert_allclose(merge_clips(outputs), [[0.5, 0.8], [0.9, 0.3]])
    np.testing.assert_allclose(
        merge_clips(outputs, method="mean"), [[0.3, 0.5], [0.6, 0.2]]
    )


def test_videos_of_any_number_of_clips_in_any_order():
    outputs = np.array([[1.0], [5.0], [3.0], [-2.0]])
    ids = np.array(["b", "a", "b", "c"])
    np.testing.assert_allclose(merge_clips(outputs, ids), [[5], [3], [-2]])
    np.testing.assert_allclose(
        merge_clips(outputs, ids, method="mean"), [[5], [2], [-2]]
    )


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("method", ["max", "mean"])
def test_logits_before_and_after_the_activation(activation, method):
    logits = 3 * np.random.default_rng(0).standard_normal((5, 4, 3))
    activate = expit if activation == "sigmoid" else lambda x: softmax(x, axis=-1)
    reduce = np.max if method == "max" else np.mean
    arguments = {"method": method, "from_logits": True, "activation": activation}
    of_scores = merge_clips(logits, merge="scores", **arguments)
    of_logits = merge_clips(logits, merge="logits", **arguments)
    np.testing.assert_allclose(of_scores, reduce(activate(logits), axis=1), rtol=1e-12)
    np.testing.assert_allclose(of_logits, activate(reduce(logits, axis=1)), rtol=1e-12)
    # Only the maximum of a monotone activation is the same in both orders.
    same = activation == "sigmoid" and method == "max"
    assert np.allclose(of_scores, of_logits) == same


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(0, 1000))
def test_equals_a_loop_over_the_videos(ids, seed):
    outputs = np.random.default_rng(seed).standard_normal((len(ids), 3))
    for method, reduce in (("max", np.max), ("mean", np.mean)):
        merged = merge_clips(outputs, ids, method=method)
        expected = [reduce(outputs[np.equal(ids, i)], axis=0) for i in sorted(set(ids))]
        np.testing.assert_allclose(merged, expected, rtol=1e-12, atol=1e-15)


def test_half_precision_is_merged_in_float32():
    merged = merge_clips(np.full((1, 4096, 1), 0.1, "float16"), method="mean")
    assert merged.dtype == np.float32
    np.testing.assert_allclose(merged, np.float16(0.1), rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "median"}, "Received: method='median'"),
        ({"merge": "probabilities"}, "Received: merge='probabilities'"),
        ({"activation": "relu"}, "Received: activation='relu'"),
        ({"merge": "logits"}, "needs logits"),
        ({"outputs": np.zeros((2, 3))}, r"\(videos, clips, classes\)"),
        ({"outputs": np.zeros((2, 0, 3))}, "at least one of each"),
        ({"video_ids": [1, 2]}, r"\(clips, classes\)"),
        ({"outputs": np.zeros((2, 3)), "video_ids": [1]}, "one entry a row"),
        ({"outputs": np.full((1, 2, 1), np.nan)}, "Received: 2 nan of 2"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        merge_clips(**{"outputs": np.zeros((2, 3, 4)), **arguments})
