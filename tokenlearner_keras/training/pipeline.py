import time
from collections.abc import Callable
from typing import Any

import keras

from tokenlearner_keras.layers._checks import check_positive_int


def make_pipeline(
    examples: Any,
    batch_size: int,
    decode: Callable[..., Any] | None = None,
    shuffle: int = 0,
    seed: int = 0,
    epoch: Any = 0,
    drop_remainder: bool = True,
    strategy: Any = None,
) -> Any:
    """Returns batches: shuffled, shared out among the workers, decoded in parallel.

    The order of the steps is what makes it fast and repeatable. References (file names,
    indices) are shuffled before they are decoded; each worker decodes its own share
    alone; and a random augmentation gets its seed from the place of the example in the
    epoch, not from the thread that runs it. The same `seed` and `epoch` give the same
    batches, and any number of workers sees the same examples in each step.

    With several workers each gets batches of its own share, which TensorFlow must not
    share out again: give them to `fit` and `evaluate` through `distribute_dataset`.

    Args:
        examples: A `tf.data.Dataset` of single examples, in a fixed order.
        batch_size: int. Examples in a step, over all workers and replicas.
        decode: Function on an example, run in parallel. If it has a parameter `seed`,
            it gets an int32 tensor of shape `(2,)` for `tf.random.stateless_*`.
        shuffle: int. Size of the shuffle buffer. 0 keeps the order.
        seed: int. Seed of the order and of the augmentation.
        epoch: int or scalar int64 tensor: another order each epoch.
        drop_remainder: bool. Whether to drop a last batch that is not full. Static
            batches compile once under XLA. With several workers all of them get the
            same number of batches, the last of which may then be empty.
        strategy: A `tf.distribute.Strategy`, or `None` for the one whose scope is open.

    Returns:
        A `tf.data.Dataset` for `fit`, or for `train` as the result of `make_dataset`.

    Raises:
        ValueError: for an argument out of range, a batch that does not divide by the
            number of replicas, or several workers and an unknown number of examples.
    """
    import inspect

    import tensorflow as tf

    check_positive_int("batch_size", batch_size)
    strategy = strategy or tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync
    if batch_size % replicas:
        raise ValueError(
            "Argument `batch_size` counts the examples over all replicas, and must "
            f"divide by their number. Received: batch_size={batch_size}, "
            f"{replicas} replicas"
        )
    if not isinstance(shuffle, int) or shuffle < 0:
        raise ValueError(
            "Argument `shuffle` must be the size of the shuffle buffer, 0 or more. "
            f"Received: shuffle={shuffle!r}"
        )
    epoch = tf.cast(epoch, "int64")
    dataset = examples
    workers, worker = num_workers(strategy)
    size = examples.cardinality()
    if workers > 1 and tf.executing_eagerly() and size < 0:
        raise ValueError(
            "Argument `examples` must have a known number of examples, so that all "
            f"{workers} workers make the same number of steps: use "
            "`tf.data.experimental.assert_cardinality`. Received: examples with "
            f"cardinality {int(size)}"
        )
    if shuffle:
        # Another seed for each epoch, and far from those of the next seeds.
        order = tf.constant(seed, "int64") * 1_000_003 + epoch
        dataset = dataset.shuffle(shuffle, seed=order, reshuffle_each_iteration=False)
    dataset = dataset.enumerate()
    if workers > 1:
        if drop_remainder:
            dataset = dataset.take(size - size % batch_size)
        dataset = dataset.shard(workers, worker)
    wants_seed = decode is not None and "seed" in inspect.signature(decode).parameters

    def decode_one(index, example):
        parts = example if isinstance(example, tuple) else (example,)
        if decode is None:
            return example
        if not wants_seed:
            return decode(*parts)
        pair = tf.stack([tf.constant(seed, "int64") * 1_000_003 + epoch, index])
        return decode(*parts, seed=tf.cast(pair % (2**31), "int32"))

    dataset = dataset.map(
        decode_one, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    dataset = dataset.batch(batch_size // workers, drop_remainder=drop_remainder)
    if workers > 1 and not drop_remainder:
        # In the last step there may be nothing left for some of the workers.
        empty = dataset.take(1).map(
            lambda *batch: tf.nest.map_structure(lambda x: x[:0], _unpacked(batch))
        )
        dataset = dataset.concatenate(empty).take(-(-size // batch_size))
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = True
    if workers > 1:
        options.experimental_distribute.auto_shard_policy = (
            tf.data.experimental.AutoShardPolicy.OFF
        )
    return dataset.prefetch(tf.data.AUTOTUNE).with_options(options)


def _unpacked(arguments):
    """What `Dataset.map` was given, from the arguments that it makes of it."""
    return arguments if len(arguments) > 1 else arguments[0]


def distribute_dataset(dataset: Any, strategy: Any = None) -> Any:
    """Returns a dataset of `make_pipeline` for `fit` and `evaluate` on several workers.

    Keras shares every `tf.data.Dataset` out among the workers, and would take each
    batch of a worker's own share for one of all workers, and count the steps wrongly.
    What this function returns it leaves as it is. `train` calls it by itself.

    Args:
        dataset: A `tf.data.Dataset` of `make_pipeline`, made under the same strategy.
        strategy: A `tf.distribute.Strategy`, or `None` for the one whose scope is open.

    Returns:
        A `tf.distribute.DistributedDataset`; with one worker, `dataset` itself.

    Example:

    ```python
    validation = make_pipeline(examples, 512, decode, strategy=strategy)
    model.evaluate(distribute_dataset(validation, strategy))
    ```
    """
    import tensorflow as tf

    strategy = strategy or tf.distribute.get_strategy()
    workers, _ = num_workers(strategy)
    if workers == 1:
        return dataset
    replicas = strategy.num_replicas_in_sync // workers
    if replicas > 1:
        size = tf.nest.flatten(dataset.element_spec)[0].shape[0]
        if size is None:
            raise ValueError(
                "Argument `dataset` must have static batches where a worker has "
                "several replicas: use `drop_remainder=True`. Received: "
                f"element_spec={dataset.element_spec}"
            )
        # A step takes a batch for each replica, so the steps are not counted by these.
        dataset = dataset.rebatch(size // replicas, drop_remainder=True)
        dataset = dataset.filter(lambda *_: True)
    return strategy.distribute_datasets_from_function(lambda context: dataset)


def is_shared_out(dataset: Any) -> bool:
    """Whether a `tf.data.Dataset` says that it holds one worker's share alone."""
    import tensorflow as tf

    policy = dataset.options().experimental_distribute.auto_shard_policy
    return policy == tf.data.experimental.AutoShardPolicy.OFF


def num_workers(strategy: Any) -> tuple[int, int]:
    """The number of workers of a `tf.distribute` strategy, and the index of this one.

    Args:
        strategy: A `tf.distribute.Strategy`.

    Returns:
        A pair of ints, `(1, 0)` without several workers.
    """
    import tensorflow as tf

    resolver = strategy.cluster_resolver
    if resolver is None or not resolver.task_type:
        return 1, 0
    if isinstance(strategy, tf.distribute.TPUStrategy):
        return 1, 0  # one program feeds all hosts
    cluster = resolver.cluster_spec().as_dict()
    chiefs = len(cluster.get("chief", ()))
    workers = len(cluster.get("worker", ()))
    first = 0 if resolver.task_type == "chief" else chiefs
    return max(chiefs + workers, 1), first + resolver.task_id


class DataWait(keras.callbacks.Callback):
    """Measures the share of the time of a step that is spent waiting for data.

    At the end of each epoch the share, from 0 to 1, is added to the logs as
    `"data_wait"`: the progress line, `History`, `CSVLogger` and `TensorBoard` show it,
    if their callback stands after this one. Near 0, the devices are the limit; near 1,
    the input pipeline is.

    Under `OneDeviceStrategy` and `MirroredStrategy` batches are copied ahead of time,
    and it is the copying that waits: the share is then an upper bound.

    Args:
        verbose: bool. Whether to print the share after each epoch.

    Example:

    ```python
    wait = DataWait()
    model.fit(wait.watch(dataset), callbacks=[wait])
    ```
    """

    def __init__(self, verbose: bool = True):
        super().__init__()
        self.verbose = verbose
        self.seconds = []  # of waiting, in each epoch
        self._waited = None

    def watch(self, dataset: Any) -> Any:
        """Returns `dataset` with a clock before and after each of its elements.

        Args:
            dataset: The last stage of a `tf.data` pipeline.

        Returns:
            A `tf.data.Dataset` with the same elements.
        """
        import tensorflow as tf

        if self._waited is None:
            with tf.device("CPU:0"):
                self._waited = tf.Variable(0.0, dtype="float64", trainable=False)
        # `zip` asks its parts in turn, so the clocks stand around the waiting.
        clock = tf.data.Dataset.counter().map(lambda _: tf.timestamp())
        timed = tf.data.Dataset.zip((clock, dataset, clock))

        def count(start, element, end):
            with tf.control_dependencies([self._waited.assign_add(end - start)]):
                return tf.nest.map_structure(tf.identity, element)

        options = tf.data.Options()
        # A prefetch after the clocks would measure its own waiting.
        options.experimental_optimization.inject_prefetch = False
        length = dataset.cardinality()
        watched = timed.map(count).with_options(options)
        if int(length) < 0:  # unknown, and to stay so
            return watched
        return watched.apply(tf.data.experimental.assert_cardinality(length))

    def on_epoch_begin(self, epoch, logs=None):
        if self._waited is not None:
            self._waited.assign(0.0)
        self._start = time.time()

    def on_train_batch_end(self, batch, logs=None):
        self._end = time.time()

    def on_epoch_end(self, epoch, logs=None):
        if self._waited is None:
            raise ValueError(
                "`DataWait` must watch the data set that is trained on: "
                "`model.fit(wait.watch(dataset), callbacks=[wait])`"
            )
        elapsed = max(self._end - self._start, 1e-9)
        self.seconds.append(float(self._waited.numpy()))
        share = min(self.seconds[-1] / elapsed, 1.0)
        if logs is not None:
            logs["data_wait"] = share
        if self.verbose:
            print(
                f"\nEpoch {epoch + 1}: {share:.1%} of the time of the steps was spent "
                "waiting for data",
                flush=True,
            )
