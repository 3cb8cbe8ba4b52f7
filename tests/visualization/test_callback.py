import keras
import numpy as np
import pytest

from tests.contract import random_like
from tests.visualization.small_model import image_model
from tokenlearner_keras.visualization import (
    AttentionMapsCallback,
    attention_grid,
    attention_maps,
    token_statistics,
)


@pytest.mark.tensorflow
def test_callback_writes_what_tensorboard_reads(tmp_path):
    pytest.importorskip("tensorboard")
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = image_model()
    model.compile("adam", "mse")
    images = np.tanh(random_like((4, 8, 8, 3)))
    callback = AttentionMapsCallback(tmp_path, images[:2], tokens=[0, 3], every=2)
    history = model.fit(
        images,
        np.zeros((4, 3)),
        epochs=5,
        batch_size=4,
        verbose=0,
        callbacks=[callback],
    )
    events = EventAccumulator(
        str(tmp_path), size_guidance={"images": 0, "tensors": 0}
    ).Reload()
    records = events.Tensors("attention_maps")
    assert [record.step for record in records] == [1, 3]
    width, height, *pictures = records[-1].tensor_proto.string_val
    assert (int(width), int(height)) == (24, 8)
    assert len(pictures) == 2
    picture = tf.io.decode_png(pictures[1]).numpy()
    expected = np.repeat((images[1:2, ..., :] + 1) / 2, 1, -1)[0]
    np.testing.assert_allclose(picture[:, :8] / 255, expected, atol=1 / 255)

    # Numbers beside them.
    statistics = token_statistics(attention_maps(model, images[:2]))
    for name, expected in (
        ("entropy", statistics.entropy.mean()),
        ("entropy_max", statistics.entropy.max()),
        ("overlap_max", (statistics.overlap * (1 - np.eye(4))).max()),
    ):
        scalars = events.Tensors(f"attention_maps_{name}")
        assert [scalar.step for scalar in scalars] == [1, 3]
        values = [float(tf.make_ndarray(scalar.tensor_proto)) for scalar in scalars]
        assert history.history[f"attention_maps_{name}"] == pytest.approx(values)
        # One epoch at Adam's usual rate changes little.
        assert values[-1] == pytest.approx(expected, abs=0.02)


@pytest.mark.tensorflow
def test_callback_shows_the_model_as_it_is(tmp_path):
    pytest.importorskip("tensorboard")
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Without a learning rate, the maps during training are those after it.
    model = image_model()
    model.compile(keras.optimizers.SGD(0.0), "mse")
    images = np.tanh(random_like((2, 8, 8, 3)))
    callback = AttentionMapsCallback(
        tmp_path, images, layer="second", columns=2, name="late"
    )
    history = model.fit(images, np.zeros((2, 3)), verbose=0, callbacks=[callback])
    events = EventAccumulator(
        str(tmp_path), size_guidance={"images": 0, "tensors": 0}
    ).Reload()
    (record,) = events.Tensors("late")
    pictures = record.tensor_proto.string_val[2:]
    maps = attention_maps(model, images, layer="second")
    expected = attention_grid(images, maps, columns=2)
    for picture, grid in zip(pictures, expected, strict=True):
        np.testing.assert_allclose(
            tf.io.decode_png(picture).numpy() / 255, grid, atol=1 / 255
        )
    entropy = token_statistics(maps).entropy
    assert history.history["late_entropy_max"] == pytest.approx([entropy.max()])


def test_invalid_arguments():
    with pytest.raises(ValueError, match="`every` must be an integer of at least 1"):
        AttentionMapsCallback("logs", np.zeros((1, 8, 8, 3)), every=0)
