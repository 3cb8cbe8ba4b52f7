import keras
import numpy as np
import pytest

from tests.contract import assert_close, random_like, randomize_weights
from tokenlearner_keras.flops import count_flops
from tokenlearner_keras.models import X2Plus1DConfig, x2plus1d
from tokenlearner_keras.models.space_time_module import MODULES

SMALL = X2Plus1DConfig(8, (8, 16), (1, 2), 2.0, 32)
SMALL_SHAPE = (4, 32, 32, 3)


def small(**arguments):
    defaults = {"num_classes": 5, "num_tokens": 2, "num_heads": 4, "key_dim": 2}
    return x2plus1d(SMALL, **{"input_shape": SMALL_SHAPE, **defaults, **arguments})


def millions(model):
    numbers = sum(np.prod(v.shape) for v in model.trainable_variables)
    return round(float(numbers) / 1e6, 2)


@pytest.mark.parametrize(
    ("module", "depthwise", "expected"),
    [
        ("conv2d+conv1d", False, 25.62),
        ("conv2d+token_learner", False, 27.37),
        ("conv2d+conv1d", (True, True, True, False), 18.69),
        ("conv2d+conv1d", True, 3.05),
    ],
)
def test_parameters(module, depthwise, expected):
    model = x2plus1d(
        input_shape=(64, 96, 96, 3), temporal_module=module, depthwise=depthwise
    )
    assert millions(model) == expected


def test_shapes_of_x3d_m():
    model = x2plus1d(input_shape=(64, 256, 256, 3))
    assert model.output_shape == (None, 157)
    sizes = {"stem_relu": (128, 24)}
    blocks = [(64, 24, 3), (32, 48, 5), (16, 96, 11), (8, 192, 7)]
    for stage, (size, channels, depth) in enumerate(blocks):
        for index in range(depth):
            sizes[f"stage_{stage}_block_{index}_relu"] = (size, channels)
    for name, (size, channels) in sizes.items():
        shape = model.get_layer(name).output.shape
        assert tuple(shape) == (None, 64, size, size, channels), name
    assert not any("block_11" in layer.name for layer in model.layers)
    # Section 5.1: 8 x 8 x 64 with 432 channels goes into every TokenLearner.
    layers = [layer for layer in model.layers if layer.name.endswith("token_learner")]
    assert [layer.name for layer in layers] == [
        f"stage_3_block_{index}_token_learner" for index in range(7)
    ]
    for layer in layers:
        assert tuple(layer.input.shape) == (None, 64, 8, 8, 432)
        assert layer.num_tokens == 8


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("module", "size", "expected"),
    [
        ("conv2d+conv1d", 256, 519.5),
        ("conv2d+conv1d", 224, 397.7),
        ("conv2d+token_learner", 256, 511.4),
    ],
)
def test_gflops(module, size, expected):
    model = x2plus1d(input_shape=(64, size, size, 3), temporal_module=module)
    report = count_flops(model, "tf_profiler")
    assert report.uncounted == {}
    # Without what a compiler fuses into the layer in front: norms and residuals.
    elementwise = ("norm", "relu", "add", "pool")
    total = sum(
        count
        for name, count in report.by_layer.items()
        if not name.endswith(elementwise)
    )
    assert round(total / 1e9, 1) == expected


@pytest.mark.parametrize("module", MODULES)
def test_every_module(module):
    model = small(temporal_module=module)
    assert model.output_shape == (None, 5)
    outputs = model.predict(random_like((2, *SMALL_SHAPE)), verbose=0)
    assert outputs.shape == (2, 5)
    assert np.all(np.isfinite(outputs))
    # The last stage halves the size whether the module has a convolution or not.
    shape = model.get_layer("stage_1_block_1_relu").output.shape
    assert tuple(shape) == (None, 4, 4, 4, 16)


@pytest.mark.parametrize("module", MODULES)
def test_a_norm_follows_what_does_not_add_its_input(module):
    model = small(temporal_module=module)
    names = {layer.name for layer in model.layers}
    for index in range(2):
        for part in MODULES[module]:
            name = f"stage_1_block_{index}_{part}"
            followed = part not in ("token_learner", "mlp_mixer")
            assert (f"{name}_norm" in names) == followed, name
            assert (f"{name}_relu" in names) == followed, name


def test_save_and_reload(tmp_path):
    model = small()
    randomize_weights(model, scale=0.1)
    x = random_like((2, *SMALL_SHAPE))
    model.save(tmp_path / "model.keras")
    reloaded = keras.saving.load_model(tmp_path / "model.keras")
    expected = model.predict(x, verbose=0)
    assert_close(reloaded.predict(x, verbose=0), expected)


def test_training_reduces_the_loss():
    keras.utils.set_random_seed(1)
    model = small(dropout=0.0)
    model.compile(
        keras.optimizers.Adam(3e-3),
        keras.losses.BinaryCrossentropy(from_logits=True),
    )
    x = random_like((4, *SMALL_SHAPE))
    y = np.random.default_rng(0).integers(0, 2, (4, 5)).astype("float32")
    losses = model.fit(x, y, epochs=24, batch_size=4, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("module", ["conv2d+conv1d", "conv2d+temporal", "joint"])
def test_any_clip_length(module):
    model = small(input_shape=(None, 32, 32, 3), temporal_module=module)
    for time in (2, 5):
        assert model.predict(random_like((1, time, 32, 32, 3)), verbose=0).shape == (
            1,
            5,
        )


def test_another_clip_length_than_the_fusers():
    model = small()
    with pytest.raises(ValueError, match=r"expected shape=\(None, 4, 32, 32, 3\)"):
        model(random_like((1, 6, 32, 32, 3)))
    with pytest.raises(ValueError, match=r"must fix time: the weights of TokenFuser"):
        small(input_shape=(None, 32, 32, 3))
    assert small(input_shape=(None, 32, 32, 3), fuser="broadcast").output_shape == (
        None,
        5,
    )


def test_any_image_size():
    model = small(input_shape=(4, None, None, 3))
    for size in (32, 48):
        x = random_like((1, 4, size, size, 3))
        assert model.predict(x, verbose=0).shape == (1, 5)


def test_heads():
    x = random_like((2, *SMALL_SHAPE))
    models = {}
    for activation in (None, "sigmoid", "softmax"):
        models[activation] = small(classifier_activation=activation)
        models[activation].set_weights(models[None].get_weights())
    logits = models[None].predict(x, verbose=0)
    sigmoid = 1 / (1 + np.exp(-logits))
    assert_close(models["sigmoid"].predict(x, verbose=0), sigmoid)
    softmax = models["softmax"].predict(x, verbose=0)
    assert_close(softmax, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    features = small(num_classes=None)
    assert features.output_shape == (None, 32)


def test_mixed_precision():
    model = small(dtype="mixed_bfloat16")
    assert model.get_layer("stage_1_block_0_token_learner").compute_dtype == "bfloat16"
    assert model.get_layer("classifier").compute_dtype == "float32"
    assert model.output.dtype == "float32"
    assert all(v.dtype == "float32" for v in model.trainable_variables)


def test_depthwise_by_stage():
    full, mixed = small(), small(depthwise=(True, False))
    for model, expected in ((full, 9 * 16 * 16), (mixed, 9 * 16)):
        layer = model.get_layer("stage_0_block_0_conv2d")
        assert layer.count_params() == expected
    for model in (full, mixed):
        layer = model.get_layer("stage_1_block_0_conv2d")
        assert layer.count_params() == 9 * 32 * 32


def test_bad_input():
    with pytest.raises(ValueError, match=r"Expected one of \('joint', .*'conv2d\+x'"):
        small(temporal_module="conv2d+x")
    with pytest.raises(ValueError, match=r"`variant` must be one of \('M',\).*'XL'"):
        x2plus1d("XL")
    with pytest.raises(ValueError, match=r"num_tokens=17 for 4 x 4 = 16 positions"):
        small(num_tokens=17)
    with pytest.raises(ValueError, match=r"`depthwise` must be a bool or 2 bools"):
        small(depthwise=(True, False, True))
    with pytest.raises(ValueError, match=r"must be \(time, height, width, channels\)"):
        small(input_shape=(32, 32, 3))
    with pytest.raises(ValueError, match=r"`dropout` must be.*dropout=1.5"):
        small(dropout=1.5)
    with pytest.raises(ValueError, match=r"`classifier_activation`.*'relu'"):
        small(classifier_activation="relu")
    with pytest.raises(ValueError, match=r"as many `filters` as `depths`"):
        x2plus1d(X2Plus1DConfig(8, (8, 16), (1,)))
