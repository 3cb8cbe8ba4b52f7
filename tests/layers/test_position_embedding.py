import keras
import numpy as np
import pytest
from keras import ops

from tests.contract import assert_close, random_like, run_layer_contract
from tokenlearner_keras.layers import PositionEmbedding


def test_contract(tmp_path):
    run_layer_contract(
        lambda **kwargs: PositionEmbedding(regularizer="l2", **kwargs),
        (2, 6, 8),
        (2, 6, 8),
        tmp_path,
        num_weights=48,
    )


def test_adds_the_same_vectors_to_every_example():
    layer = PositionEmbedding()
    x = random_like((3, 200, 16))
    outputs = ops.convert_to_numpy(layer(x))
    embeddings = ops.convert_to_numpy(layer.embeddings.value)
    assert embeddings.shape == (1, 200, 16)
    assert embeddings.std() == pytest.approx(0.02, rel=0.1)
    np.testing.assert_array_equal(outputs, x + embeddings)


def test_zero_embeddings_are_the_identity():
    x = random_like((2, 4, 8))
    assert_close(PositionEmbedding(initializer="zeros")(x), x, 0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 4, 8), "must have rank 3"),
        ((2, None, 8), "a known number of positions"),
        ((2, 4, None), r"\(channels\) .* must be known"),
    ],
)
def test_bad_input(shape, message):
    with pytest.raises(ValueError, match=message):
        PositionEmbedding()(keras.Input(batch_shape=shape))
