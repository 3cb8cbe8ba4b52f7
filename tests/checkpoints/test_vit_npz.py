import time
import tracemalloc

import keras
import numpy as np
import pytest
import scipy.ndimage

from tests.checkpoints.test_scenic import relative_error, spoil
from tests.conftest import FIXTURES
from tests.contract import assert_close, random_like, randomize_weights, to_numpy
from tokenlearner_keras.checkpoints import load_vit_npz, save_vit_npz
from tokenlearner_keras.models import ViTConfig, vit, vivit
from tokenlearner_keras.models.vit_config import VARIANTS

CONFIG = ViTConfig(patch_size=8, hidden_dim=48, num_layers=3, num_heads=3, mlp_dim=96)
FIXTURE_ARGUMENTS = {
    "augreg_vit_gap": {"input_shape": (24, 24, 3)},
    "augreg_vit_token": {"input_shape": (32, 32, 3), "classifier": "token"},
    "imagenet21k_vit_token_prelogits": {
        "input_shape": (32, 32, 3),
        "classifier": "token",
        "representation_size": 40,
    },
}
POSITIONS = "Transformer/posembed_input/pos_embedding"


def weights_path(name):
    return FIXTURES / f"{name}.weights.npz"


def build(name, **arguments):
    model = vit(CONFIG, **{"num_classes": 7, **FIXTURE_ARGUMENTS[name], **arguments})
    randomize_weights(model)
    return model


def arrays_of(path):
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", FIXTURE_ARGUMENTS)
def test_parity(name, load_fixture):
    arrays = load_fixture(f"{name}.io")
    model = build(name)
    report = load_vit_npz(model, weights_path(name))
    assert relative_error(model(arrays["inputs"]), arrays["outputs"]) <= 1e-5
    assert report.unused == report.unset == ()
    assert set(report.matched) == set(arrays_of(weights_path(name)))


@pytest.mark.parametrize("name", FIXTURE_ARGUMENTS)
def test_round_trip_is_exact(name, tmp_path):
    model = build(name)
    load_vit_npz(model, weights_path(name))
    report = save_vit_npz(model, tmp_path / "saved.npz")
    assert report.unset == ()
    expected, saved = arrays_of(weights_path(name)), arrays_of(tmp_path / "saved.npz")
    assert set(saved) == set(expected)
    for key, array in expected.items():
        assert saved[key].dtype == array.dtype
        np.testing.assert_array_equal(saved[key], array)
    twin = build(name)
    load_vit_npz(twin, str(tmp_path / "saved.npz"))
    for a, b in zip(model.get_weights(), twin.get_weights()):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(16, 64, 3), (24, 40, 3), (32, 8, 3)])
def test_round_trip_of_other_grids(shape, tmp_path):
    """2 x 8 positions are not read back as 4 x 4."""
    model = build("augreg_vit_token", input_shape=shape)
    save_vit_npz(model, tmp_path / "saved.npz")
    twin = build("augreg_vit_token", input_shape=shape)
    twin.set_weights([w + 1 for w in twin.get_weights()])
    load_vit_npz(twin, tmp_path / "saved.npz")
    for a, b in zip(model.get_weights(), twin.get_weights()):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(variant, tmp_path):
    """The layout of every size, on one block each."""
    config = VARIANTS[variant]
    shape = (2 * config.patch_size, config.patch_size, 3)
    model = vit(variant, shape, 3, num_layers=1, classifier="token")
    arrays = {}
    rng = np.random.default_rng(0)
    dim, heads = config.hidden_dim, config.num_heads
    block = "Transformer/encoderblock_0"
    attention = f"{block}/MultiHeadDotProductAttention_1"
    sizes = {
        "cls": (1, 1, dim),
        "embedding/kernel": (config.patch_size, config.patch_size, 3, dim),
        "embedding/bias": (dim,),
        POSITIONS: (1, 1 + 2, dim),
        "Transformer/encoder_norm/scale": (dim,),
        "Transformer/encoder_norm/bias": (dim,),
        "head/kernel": (dim, 3),
        "head/bias": (3,),
        f"{attention}/out/kernel": (heads, dim // heads, dim),
        f"{attention}/out/bias": (dim,),
        f"{block}/MlpBlock_3/Dense_0/kernel": (dim, config.mlp_dim),
        f"{block}/MlpBlock_3/Dense_0/bias": (config.mlp_dim,),
        f"{block}/MlpBlock_3/Dense_1/kernel": (config.mlp_dim, dim),
        f"{block}/MlpBlock_3/Dense_1/bias": (dim,),
    }
    for part in ("query", "key", "value"):
        sizes[f"{attention}/{part}/kernel"] = (dim, heads, dim // heads)
        sizes[f"{attention}/{part}/bias"] = (heads, dim // heads)
    for norm in ("LayerNorm_0", "LayerNorm_2"):
        sizes[f"{block}/{norm}/scale"] = sizes[f"{block}/{norm}/bias"] = (dim,)
    arrays = {
        name: rng.standard_normal(size, dtype="float32") for name, size in sizes.items()
    }
    np.savez(tmp_path / "weights.npz", **arrays)
    report = load_vit_npz(model, tmp_path / "weights.npz")
    assert report.unset == report.unused == ()
    assert sum(a.size for a in arrays.values()) == model.count_params()
    np.testing.assert_array_equal(
        model.get_layer("position_embedding").get_weights()[0], arrays[POSITIONS]
    )


@pytest.mark.parametrize("name", ["augreg_vit_gap", "augreg_vit_token"])
@pytest.mark.parametrize("shape", [(48, 48, 3), (16, 56, 3), (40, 24, 3)])
def test_positions_are_resized_as_the_original(name, shape):
    model = build(name, input_shape=shape)
    load_vit_npz(model, weights_path(name))
    expected = arrays_of(weights_path(name))[POSITIONS][0]
    first = int("token" in name)
    side = int(np.sqrt(len(expected)))
    grid = expected[first:].reshape(side, side, -1)
    zoom = (shape[0] / 8 / side, shape[1] / 8 / side, 1)
    resized = scipy.ndimage.zoom(grid, zoom, order=1).reshape(-1, 48)
    actual = model.get_layer("position_embedding").get_weights()[0][0]
    np.testing.assert_array_equal(actual[:first], expected[:first])
    np.testing.assert_allclose(actual[first:], resized, rtol=0, atol=1e-6)


@pytest.mark.parametrize("arguments", [{}, {"token_fuser": True}])
def test_a_token_learner_stays_unset_and_is_reported(arguments):
    model = build("augreg_vit_token", num_tokens=3, token_learner="v11", **arguments)
    learned = [
        variable
        for layer in model.layers
        if "token_learner" in layer.name or "token_fuser" in layer.name
        for variable in layer.weights
    ]
    before = {v.path: np.array(keras.ops.convert_to_numpy(v)) for v in learned}
    with pytest.warns(UserWarning, match=r"unset: token_learner"):
        report = load_vit_npz(model, weights_path("augreg_vit_token"))
    assert set(report.unset) == set(before)
    assert report.unused == ()
    for variable in learned:
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(variable), before[variable.path]
        )
    # The blocks before the location compute what the plain model's do.
    plain = build("augreg_vit_token")
    load_vit_npz(plain, weights_path("augreg_vit_token"))
    x = random_like((2, 32, 32, 3))
    features = [
        keras.Model(m.input, m.get_layer("block_0").output)(x) for m in (model, plain)
    ]
    np.testing.assert_array_equal(*[to_numpy(f)[0] for f in features])


def test_saving_a_token_learner_warns(tmp_path):
    model = build("augreg_vit_gap", num_tokens=3)
    with pytest.warns(UserWarning, match=r"3 weights of 'vit' have no place"):
        report = save_vit_npz(model, tmp_path / "saved.npz")
    assert len(report.unset) == 3
    load_vit_npz(build("augreg_vit_gap"), tmp_path / "saved.npz")


def test_new_head():
    name = "imagenet21k_vit_token_prelogits"
    model = build(name, num_classes=4, representation_size=None)
    head = [np.array(w) for w in model.get_layer("head").get_weights()]
    with pytest.raises(ValueError, match=r"'head/kernel' .* must have shape \(48, 4\)"):
        load_vit_npz(model, weights_path(name))
    with pytest.warns(UserWarning, match=r"unset: head/kernel"):
        report = load_vit_npz(model, weights_path(name), load_head=False)
    assert set(report.unused) == {
        "head/kernel",
        "head/bias",
        "pre_logits/kernel",
        "pre_logits/bias",
    }
    assert set(report.unset) == {"head/kernel", "head/bias"}
    for a, b in zip(head, model.get_layer("head").get_weights()):
        np.testing.assert_array_equal(a, b)


def test_features_only(load_fixture):
    """A model without head leaves the head's weights unused."""
    model = build("augreg_vit_gap", classifier=None)
    with pytest.warns(UserWarning, match=r"unused: head/"):
        report = load_vit_npz(model, weights_path("augreg_vit_gap"))
    assert set(report.unused) == {"head/kernel", "head/bias"}
    arrays = load_fixture("augreg_vit_gap.io")
    weights = arrays_of(weights_path("augreg_vit_gap"))
    pooled = to_numpy(model(arrays["inputs"]))[0].mean(axis=1)
    outputs = pooled @ weights["head/kernel"] + weights["head/bias"]
    assert relative_error(outputs, arrays["outputs"]) <= 1e-5


def test_class_token_checkpoint_into_gap_model():
    model = build("augreg_vit_gap", input_shape=(32, 32, 3))
    with pytest.warns(UserWarning, match=r"unused: cls"):
        report = load_vit_npz(model, weights_path("augreg_vit_token"))
    assert report.unused == ("cls",)
    expected = arrays_of(weights_path("augreg_vit_token"))[POSITIONS][:, 1:]
    np.testing.assert_array_equal(
        model.get_layer("position_embedding").get_weights()[0], expected
    )


def test_gap_checkpoint_into_class_token_model():
    model = build("augreg_vit_token", input_shape=(24, 24, 3))
    with pytest.raises(ValueError, match=r"1 weight\(s\) .* are missing in .*: cls\."):
        load_vit_npz(model, weights_path("augreg_vit_gap"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"1 weight\(s\) that 'vit' needs are missing in .*: "),
        ("shape", r"must have shape \(96, 48\).*Received: shape \(96, 47\)"),
        ("nan", "not finite"),
        ("object", "never unpickled"),
    ],
)
def test_a_bad_weight_is_named_and_nothing_is_loaded(how, message, tmp_path):
    name = "Transformer/encoderblock_2/MlpBlock_3/Dense_1/kernel"
    path = tmp_path / "spoilt.npz"
    np.savez(path, **spoil(arrays_of(weights_path("augreg_vit_gap")), name, how))
    model = build("augreg_vit_gap")
    before = model.get_weights()
    with pytest.raises(ValueError, match=message) as error:
        load_vit_npz(model, path)
    assert name in str(error.value)
    for a, b in zip(before, model.get_weights()):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file(fraction, tmp_path):
    data = weights_path("augreg_vit_gap").read_bytes()
    path = tmp_path / "truncated.npz"
    path.write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(ValueError, match=r"truncated.npz' is no readable .npz archive"):
        load_vit_npz(build("augreg_vit_gap"), path)


def test_flipped_byte_is_found(tmp_path):
    """The archive's checksums tell damage inside an array."""
    data = bytearray(weights_path("augreg_vit_gap").read_bytes())
    data[len(data) // 2] ^= 0x55
    path = tmp_path / "damaged.npz"
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"Weight '.*' of '.*damaged.npz' cannot be read"
    ):
        load_vit_npz(build("augreg_vit_gap"), path)


def test_other_files(tmp_path):
    model = build("augreg_vit_gap")
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"must be an .npz archive of named arrays"):
        load_vit_npz(model, tmp_path / "array.npy")
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"a pickle, which is never loaded"):
        load_vit_npz(model, tmp_path / "pickle.npy")
    with pytest.raises(FileNotFoundError):
        load_vit_npz(model, tmp_path / "absent.npz")


def test_positions_that_are_no_square(tmp_path):
    arrays = arrays_of(weights_path("augreg_vit_gap"))
    arrays[POSITIONS] = random_like((1, 12, 48))
    path = tmp_path / "weights.npz"
    np.savez(path, **arrays)
    model = build("augreg_vit_gap")
    with pytest.raises(ValueError, match=r"12 positions, .* pass `position_grid="):
        load_vit_npz(model, path)
    load_vit_npz(model, path, position_grid=(2, 6))
    grid = arrays[POSITIONS].reshape(2, 6, 48)
    expected = scipy.ndimage.zoom(grid, (3 / 2, 3 / 6, 1), order=1).reshape(1, 9, 48)
    np.testing.assert_allclose(
        model.get_layer("position_embedding").get_weights()[0], expected, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"must multiply .*\(3, 3\) for 12 positions"):
        load_vit_npz(model, path, position_grid=(3, 3))
    with pytest.raises(ValueError, match=r"`position_grid` must be positive integers"):
        load_vit_npz(model, path, position_grid=(12,))


def test_bfloat16_arrays(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = arrays_of(weights_path("augreg_vit_gap"))
    rounded = {key: a.astype(ml_dtypes.bfloat16) for key, a in arrays.items()}
    np.savez(tmp_path / "bfloat16.npz", **rounded)
    model = build("augreg_vit_gap")
    load_vit_npz(model, tmp_path / "bfloat16.npz")
    np.testing.assert_array_equal(
        model.get_layer("patch_embedding").get_weights()[0],
        rounded["embedding/kernel"].astype("float32"),
    )


def test_into_mixed_precision_and_a_reloaded_model(tmp_path, load_fixture):
    arrays = load_fixture("augreg_vit_gap.io")
    model = build("augreg_vit_gap", dtype="mixed_bfloat16")
    load_vit_npz(model, weights_path("augreg_vit_gap"))
    assert_close(model(arrays["inputs"]), arrays["outputs"], 0.05)
    model = build("augreg_vit_gap")
    model.save(tmp_path / "model.keras")
    model = keras.saving.load_model(tmp_path / "model.keras")
    load_vit_npz(model, weights_path("augreg_vit_gap"))
    assert relative_error(model(arrays["inputs"]), arrays["outputs"]) <= 1e-5


def test_other_models(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    for function in (load_vit_npz, save_vit_npz):
        with pytest.raises(ValueError, match=r"`model` must be built by .*vit"):
            function(model, tmp_path / "file.npz")
        with pytest.raises(ValueError, match=r"`model` must be built by .*vit"):
            function(vivit(CONFIG, (2, 8, 8, 3), (1, 8, 8)), tmp_path / "file.npz")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.npz"
    model = build("augreg_vit_gap")
    save_vit_npz(model, path)
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match=r"disk full"):
        save_vit_npz(model, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["weights.npz"]


def test_at_most_two_copies_of_the_weights(tmp_path):
    """Beside one copy of the weights, no more than two arrays are ever allocated.

    The copy is traced where TensorFlow makes NumPy's memory the variable's own, which
    it does wherever that memory happens to be aligned: for none, some or all weights.
    """
    model = vit(ViTConfig(8, 256, 6, 4, 1024), (32, 32, 3), 10)
    save_vit_npz(model, tmp_path / "weights.npz")
    sizes = [weight.nbytes for weight in model.get_weights()]
    tracemalloc.start()
    load_vit_npz(model, tmp_path / "weights.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < sum(sizes) + 2 * max(sizes)


@pytest.mark.slow
def test_s16_loads_in_two_seconds(tmp_path):
    """CPU seconds: what the load takes on a machine that does nothing else."""
    model = vit("S/16", classifier="token")
    save_vit_npz(model, tmp_path / "s16.npz")
    times = []
    for _ in range(3):
        start = time.process_time()
        load_vit_npz(model, tmp_path / "s16.npz")
        times.append(time.process_time() - start)
    assert min(times) < 2
