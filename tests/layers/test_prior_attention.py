import keras
import numpy as np
import pytest

from tests.contract import assert_close, random_like, run_layer_contract
from tokenlearner_keras.layers import PriorAttention


def test_contract(tmp_path):
    run_layer_contract(
        PriorAttention, (2, 6, 8), (2, 6, 8), tmp_path, num_weights=36 + 64
    )


def test_zero_prior_is_a_mean():
    x = random_like((2, 6, 8))
    layer = PriorAttention(kernel_initializer="identity")
    mean = x.mean(axis=1, keepdims=True)
    assert_close(layer(x), np.broadcast_to(mean, x.shape))


def test_large_prior_selects():
    x = random_like((2, 4, 8))
    layer = PriorAttention(kernel_initializer="identity")
    layer.build(x.shape)
    layer.prior.assign(100 * np.eye(4)[[2, 0, 3, 1]])
    assert_close(layer(x), x[:, [2, 0, 3, 1]])


def test_bad_input():
    with pytest.raises(ValueError, match=r"known positions.*None"):
        PriorAttention()(keras.Input((None, 8)))
    layer = PriorAttention()
    layer(random_like((1, 4, 8)))
    with pytest.raises(ValueError, match=r"built for 4 positions\. Received: 5"):
        layer(keras.Input((5, 8)))
