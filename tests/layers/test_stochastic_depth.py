import keras
import numpy as np
import pytest
from keras import ops

from tests.contract import random_like, run_layer_contract
from tokenlearner_keras.layers import StochasticDepth


@pytest.mark.parametrize("shape", [(2, 5, 8), (2, 3, 4, 5, 6), (2, 7)])
def test_contract(shape, tmp_path):
    run_layer_contract(
        lambda **kwargs: StochasticDepth(0.3, seed=1, **kwargs),
        shape,
        shape,
        tmp_path,
        num_weights=0,
    )


def test_inference_returns_the_inputs():
    x = random_like((3, 4, 5))
    for layer, training in [
        (StochasticDepth(0.9), False),
        (StochasticDepth(0.0), True),
    ]:
        outputs = ops.convert_to_numpy(layer(x, training=training))
        np.testing.assert_array_equal(outputs, x)


@pytest.mark.parametrize("shape", [(1000, 3, 2), (1000, 2, 2, 2, 2)])
def test_whole_examples_are_dropped_and_the_rest_scaled(shape):
    rate = 0.25
    outputs = ops.convert_to_numpy(
        StochasticDepth(rate, seed=3)(np.ones(shape, "float32"), training=True)
    ).reshape(shape[0], -1)
    kept = outputs[:, 0] != 0
    np.testing.assert_array_equal(outputs[~kept], 0)
    np.testing.assert_allclose(outputs[kept], 1 / (1 - rate), rtol=1e-6)
    # 1000 draws: four standard deviations are 0.055.
    assert abs(kept.mean() - (1 - rate)) < 0.055


def test_draws_differ_between_calls_and_repeat_with_the_seed():
    x = np.ones((64, 2, 2), "float32")

    def draws(seed):
        layer = StochasticDepth(0.5, seed=seed)
        return [ops.convert_to_numpy(layer(x, training=True)) for _ in range(2)]

    first, second = draws(1)
    assert np.any(first != second)
    again = draws(1)
    np.testing.assert_array_equal(first, again[0])
    np.testing.assert_array_equal(second, again[1])


def test_unknown_batch_in_a_trained_model():
    inputs = keras.Input((4,))
    branch = StochasticDepth(0.5, seed=0)(keras.layers.Dense(4)(inputs))
    model = keras.Model(inputs, inputs + branch)
    model.compile(loss="mse", optimizer="sgd")
    loss = model.train_on_batch(random_like((6, 4)), random_like((6, 4), 1))
    assert np.isfinite(loss)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2, "0.1", None, True])
def test_bad_rate(rate):
    with pytest.raises(ValueError, match=r"`rate` must be a number in \[0, 1\)"):
        StochasticDepth(rate)
