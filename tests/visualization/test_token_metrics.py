import math

import keras
import numpy as np
import pytest

from tokenlearner_keras.visualization import (
    TokenEntropy,
    TokenOverlap,
    TokenStatistics,
    token_entropy,
    token_overlap,
    token_statistics,
)

pytestmark = pytest.mark.backends


def known_maps():
    """Maps of 2 x 3 positions of four tokens, by hand.

    Uniform; one position; two positions alike, one of them that of the second token;
    the third times 5.
    """
    maps = np.zeros((1, 4, 2, 3), "float32")
    maps[0, 0] = 0.7
    maps[0, 1, 0, 0] = 0.2
    maps[0, 2, 0, :2] = 0.1
    maps[0, 3] = 5 * maps[0, 2]
    return maps


def numpy(x):
    return keras.ops.convert_to_numpy(x)


def test_entropy_by_hand():
    nats = [math.log(6), 0.0, math.log(2), math.log(2)]
    values = numpy(token_entropy(known_maps(), normalize=False))
    np.testing.assert_allclose(values, [nats], atol=1e-6)
    values = numpy(token_entropy(known_maps()))
    np.testing.assert_allclose(values, [np.array(nats) / math.log(6)], atol=1e-6)


def test_overlap_by_hand():
    expected = [
        [1, 1 / 6, 1 / 3, 1 / 3],
        [1 / 6, 1, 1 / 2, 1 / 2],
        [1 / 3, 1 / 2, 1, 1],
        [1 / 3, 1 / 2, 1, 1],
    ]
    values = numpy(token_overlap(known_maps()))
    np.testing.assert_allclose(values, [expected], atol=1e-6)
    # Disjoint maps.
    maps = np.zeros((1, 2, 2, 2))
    maps[0, 0, 0], maps[0, 1, 1] = 0.3, (0.1, 0.9)
    np.testing.assert_allclose(numpy(token_overlap(maps)), [np.eye(2)], atol=1e-6)


def test_entropy_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    maps = np.random.default_rng(0).random((2, 3, 4, 5, 6))
    expected = stats.entropy(maps.reshape(2, 3, 4, 30), axis=-1)
    values = numpy(token_entropy(maps, normalize=False))
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    overlap = numpy(token_overlap(maps))
    assert overlap.shape == (2, 3, 4, 4)
    # One minus half of the sum of the differences.
    p = maps.reshape(2, 3, 4, 30)
    p = p / p.sum(-1, keepdims=True)
    expected = 1 - np.abs(p[..., :, None, :] - p[..., None, :, :]).sum(-1) / 2
    np.testing.assert_allclose(overlap, expected, rtol=1e-5)


def test_a_map_of_zeros_is_uniform():
    maps = np.zeros((1, 2, 3, 3))
    maps[0, 1] = 0.5
    np.testing.assert_allclose(numpy(token_entropy(maps)), [[1, 1]], atol=1e-6)
    np.testing.assert_allclose(
        numpy(token_overlap(maps)), np.ones((1, 2, 2)), atol=1e-6
    )


def test_half_precision_maps_are_measured_in_float32():
    maps = keras.ops.cast(np.random.default_rng(0).random((1, 2, 24, 24)), "float16")
    values = token_entropy(maps)
    assert keras.backend.standardize_dtype(values.dtype) == "float32"
    expected = numpy(token_entropy(numpy(maps).astype("float32")))
    np.testing.assert_allclose(numpy(values), expected, rtol=1e-6)


def test_statistics():
    # The second example looks elsewhere with token 1 alone.
    maps = np.concatenate([known_maps()] * 2)
    maps[1, 1] = 0
    maps[1, 1, 1, 2] = 0.4
    statistics = token_statistics(maps)
    np.testing.assert_allclose(
        statistics.entropy,
        np.array([math.log(6), 0, math.log(2), math.log(2)]) / math.log(6),
        atol=1e-6,
    )
    np.testing.assert_allclose(
        statistics.overlap[1], [1 / 6, 1, 1 / 4, 1 / 4], atol=1e-6
    )
    # Half of the attention is elsewhere than on the mean map.
    np.testing.assert_allclose(statistics.change, [0, 0.5, 0, 0], atol=1e-6)
    assert statistics.dead() == [0]
    assert statistics.dead(threshold=0.3) == [0, 2, 3]
    assert statistics.duplicates() == [(2, 3)]
    assert statistics.duplicates(threshold=0.3) == [(0, 2), (0, 3), (2, 3)]
    text = str(statistics)
    assert "dead: [0]" in text
    assert "duplicates: [(2, 3)]" in text
    assert "    2    0.387   0.000  1.000 (token 3)" in text
    # Frames of clips count as examples.
    clips = token_statistics(maps[None])
    assert isinstance(clips, TokenStatistics)
    for field in ("entropy", "overlap", "change"):
        np.testing.assert_allclose(
            getattr(clips, field), getattr(statistics, field), atol=1e-6
        )
    single = token_statistics(maps[:, :1])
    assert single.duplicates() == []
    assert "duplicates: none" in str(single)


def test_metrics_average_over_batches():
    maps = np.random.default_rng(0).random((6, 3, 4, 4)).astype("float32") ** 4
    entropies = numpy(token_entropy(maps)).mean(axis=0)
    overlaps = numpy(token_overlap(maps)).mean(axis=0)
    pairs = overlaps[~np.eye(3, dtype=bool)]
    for metric, expected in (
        (TokenEntropy(3), entropies.mean()),
        (TokenEntropy(3, average="min"), entropies.min()),
        (TokenEntropy(3, average="max"), entropies.max()),
        (TokenEntropy(3, average=None), entropies),
        (TokenOverlap(3), pairs.mean()),
        (TokenOverlap(3, average="max"), pairs.max()),
        (TokenOverlap(3, average=None), overlaps),
    ):
        metric = keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(metric)
        )
        # Batches of different sizes count by their examples.
        metric.update_state(maps[:4])
        metric.update_state(maps[4:])
        np.testing.assert_allclose(numpy(metric.result()), expected, rtol=1e-5)
        # A weight of 0 leaves an example out.
        metric.reset_state()
        metric.update_state(maps[:2], sample_weight=np.array([0.0, 2.0]))
        one = keras.saving.deserialize_keras_object(
            keras.saving.serialize_keras_object(metric)
        )
        one.update_state(maps[1:2])
        np.testing.assert_allclose(
            numpy(metric.result()), numpy(one.result()), rtol=1e-5
        )
        # Two clips of three frames.
        metric.reset_state()
        metric.update_state(maps.reshape(2, 3, 3, 4, 4))
        np.testing.assert_allclose(numpy(metric.result()), expected, rtol=1e-5)


def test_one_token_overlaps_with_none():
    metric = TokenOverlap(1)
    metric.update_state(np.ones((2, 1, 3, 3)))
    assert float(metric.result()) == 0
    assert float(TokenOverlap(2).result()) == 0  # nothing seen yet


def test_metrics_in_evaluate():
    # A model that returns its maps.
    inputs = keras.Input((4, 4, 2))
    maps = keras.ops.moveaxis(inputs, -1, 1)
    model = keras.Model(inputs, maps)

    class Entropy(TokenEntropy):
        def update_state(self, y_true, y_pred, sample_weight=None):
            super().update_state(y_pred, sample_weight)

    model.compile(loss="mse", metrics=[Entropy(2)])
    images = np.random.default_rng(0).random((5, 4, 4, 2)).astype("float32")
    results = model.evaluate(
        images, np.moveaxis(images, -1, 1), batch_size=2, return_dict=True, verbose=0
    )
    expected = numpy(token_entropy(np.moveaxis(images, -1, 1))).mean()
    assert results["token_entropy"] == pytest.approx(expected, rel=1e-5)


def test_invalid_arguments():
    with pytest.raises(
        ValueError, match=r"`maps` must have the shape .*shape \(3, 3\)"
    ):
        token_entropy(np.ones((3, 3)))
    with pytest.raises(ValueError, match=r"must have the shape .*shape \(2, 3, 3\)"):
        token_statistics(np.ones((2, 3, 3)))
    with pytest.raises(
        ValueError, match="`num_tokens` must be an integer of at least 1"
    ):
        TokenEntropy(0)
    with pytest.raises(ValueError, match=r"argument `average`.*average='median'"):
        TokenEntropy(2, average="median")
    with pytest.raises(ValueError, match=r"argument `average`.*average='min'"):
        TokenOverlap(2, average="min")
    with pytest.raises(ValueError, match=r"maps of num_tokens=2 tokens.*\(4, 3\)"):
        TokenEntropy(2).update_state(np.ones((4, 3, 5, 5)))
