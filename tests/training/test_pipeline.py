import time
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from tokenlearner_keras.training import DataWait, make_pipeline
from tokenlearner_keras.training.pipeline import num_workers

pytestmark = pytest.mark.tensorflow


def numbers(count=40):
    import tensorflow as tf

    return tf.data.Dataset.range(count)


def values(dataset):
    return [batch.tolist() for batch in dataset.as_numpy_iterator()]


def fake_strategy(workers, worker):
    """What `make_pipeline` asks of a strategy of several workers."""
    addresses = [f"host{index}:1" for index in range(workers)]
    cluster = SimpleNamespace(as_dict=lambda: {"worker": addresses})
    resolver = SimpleNamespace(
        task_type="worker", task_id=worker, cluster_spec=lambda: cluster
    )
    return SimpleNamespace(num_replicas_in_sync=workers, cluster_resolver=resolver)


def noisy(value, seed):
    import tensorflow as tf

    noise = tf.random.stateless_uniform((), seed, maxval=1000, dtype=tf.int64)
    return value * 1000 + noise


def test_deterministic_under_a_seed():
    def epoch(number, seed=0, **arguments):
        pipeline = make_pipeline(
            numbers(), 8, noisy, shuffle=40, seed=seed, epoch=number, **arguments
        )
        return values(pipeline)

    first = epoch(0)
    assert epoch(0) == first
    for other in (epoch(1), epoch(0, seed=1)):
        assert other != first
        # Another order of the same examples, with another augmentation.
        assert sorted(v // 1000 for b in other for v in b) == list(range(40))
        assert {v for b in other for v in b}.isdisjoint({v for b in first for v in b})


def test_workers_share_each_step():
    def steps(strategy):
        pipeline = make_pipeline(
            numbers(), 8, noisy, shuffle=40, seed=3, strategy=strategy
        )
        return values(pipeline)

    alone = steps(fake_strategy(1, 0))
    shares = [steps(fake_strategy(2, worker)) for worker in range(2)]
    assert len(alone) == len(shares[0]) == len(shares[1]) == 5
    for batch, first, second in zip(alone, *shares):
        assert len(first) == len(second) == 4
        assert sorted(first + second) == sorted(batch)


def test_workers_make_the_same_number_of_steps():
    def steps(worker, count, **arguments):
        pipeline = make_pipeline(
            numbers(count), 4, strategy=fake_strategy(2, worker), **arguments
        )
        found = values(pipeline)
        assert pipeline.cardinality() == len(found)
        return found

    assert steps(0, 11) == [[0, 2], [4, 6]]
    assert steps(1, 11) == [[1, 3], [5, 7]]
    assert steps(0, 9, drop_remainder=False) == [[0, 2], [4, 6], [8]]
    assert steps(1, 9, drop_remainder=False) == [[1, 3], [5, 7], []]
    assert steps(1, 8, drop_remainder=False) == [[1, 3], [5, 7]]
    with pytest.raises(ValueError, match="must have a known number of examples"):
        make_pipeline(
            numbers().filter(lambda x: x > 1), 4, strategy=fake_strategy(2, 0)
        )


def test_num_workers():
    import tensorflow as tf

    assert num_workers(tf.distribute.get_strategy()) == (1, 0)
    strategy = fake_strategy(3, 1)
    assert num_workers(strategy) == (3, 1)
    chief = {"chief": ["host:1"], "worker": ["host0:1", "host1:1"]}
    strategy.cluster_resolver.cluster_spec = lambda: SimpleNamespace(
        as_dict=lambda: chief
    )
    assert num_workers(strategy) == (3, 2)


def test_static_batches_and_options():
    pipeline = make_pipeline(numbers(10), 4)
    assert pipeline.element_spec.shape == (4,)
    assert pipeline.cardinality() == 2
    assert values(make_pipeline(numbers(10), 4, drop_remainder=False))[-1] == [8, 9]
    options = pipeline.options()
    assert options.deterministic
    assert options.autotune.enabled


def test_misuse():
    with pytest.raises(ValueError, match=r"must divide by their number.*2 replicas"):
        make_pipeline(numbers(), 3, strategy=fake_strategy(2, 0))
    with pytest.raises(ValueError, match="`batch_size` must be an integer"):
        make_pipeline(numbers(), 0)
    with pytest.raises(ValueError, match="`shuffle` must be the size"):
        make_pipeline(numbers(), 2, shuffle=-1)


def test_data_wait(capsys):
    import tensorflow as tf

    def slow(value):
        time.sleep(0.1)
        return value

    def decode(value):
        value = tf.numpy_function(slow, [value], tf.int64)
        return tf.ensure_shape(tf.cast(value, "float32"), ())

    data = numbers(8).map(decode).batch(1).map(lambda x: (x[:, None], x))
    wait = DataWait()
    inputs = keras.Input((1,))
    model = keras.Model(inputs, keras.layers.Dense(1)(inputs))
    model.compile("sgd", "mse")
    watched = wait.watch(data)
    assert watched.cardinality() == 8
    assert watched.element_spec == data.element_spec
    start = time.time()
    history = model.fit(watched, epochs=2, verbose=0, shuffle=False, callbacks=[wait])
    elapsed = time.time() - start
    # Each epoch waits for its 8 examples, whatever else the machine does. One of them
    # may be read while the step before runs.
    assert all(0.7 <= seconds < elapsed for seconds in wait.seconds), wait.seconds
    shares = history.history["data_wait"]
    assert all(w / elapsed < s <= 1 for w, s in zip(wait.seconds, shares, strict=True))
    assert f"{shares[1]:.1%} of the time" in capsys.readouterr().out

    # The same data, ready before they are asked for: no waiting to speak of.
    ready = data.cache()
    list(ready)
    before = wait.seconds[1]
    wait = DataWait(verbose=False)
    model.fit(wait.watch(ready), verbose=0, shuffle=False, callbacks=[wait])
    assert wait.seconds[0] < before
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="must watch the data set"):
        model.fit(data, verbose=0, shuffle=False, callbacks=[DataWait()])


def test_watched_values():
    data = numbers(6).batch(2)
    np.testing.assert_array_equal(values(DataWait().watch(data)), values(data))
