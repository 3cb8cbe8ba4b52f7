import pytest

from tests.contract import (
    run_layer_contract,
)
from tokenlearner_keras.layers import TokenLearner

VARIANTS = ["v1", "video", "v10", "v11"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("shape", "expected", "arguments"),
    [
        ((2, 6, 5, 12), (2, 4, 12), {}),
        ((2, 30, 12), (2, 4, 12), {"grid_shape": (6, 5)}),
        ((2, 3, 6, 5, 12), (2, 12, 12), {}),
    ],
)
def test_contract(variant, shape, expected, arguments, tmp_path):
    def make_layer(**kwargs):
        return getattr(TokenLearner, variant)(4, **arguments, **kwargs)

    run_layer_contract(make_layer, shape, expected, tmp_path)
