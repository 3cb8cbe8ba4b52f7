import math

import keras
from keras import ops

from tokenlearner_keras.layers._checks import check_choice, check_positive_int

EMPTY_CLASS_POLICIES = ("ignore", "zero", "nan")
# Rows that a replica has above its even share, for last batches split unevenly.
REPLICA_MARGIN = 256


def average_precision(labels, scores, sample_weight=None):
    """Average precision of each class, as scikit-learn's `average_precision_score`.

    The sum over the distinct scores, from the highest down, of the step in recall
    times the precision at that score: no interpolation, and equal scores count as one
    threshold.

    Args:
        labels: Tensor of shape `(examples, classes)`. An entry over 0.5 is a positive.
        scores: Tensor of shape `(examples, classes)`; higher means more likely.
        sample_weight: Optional tensor of shape `(examples,)`, weights of at least 0.

    Returns:
        Float tensor of shape `(classes,)`, `nan` for a class without positives or with
        a score that is `nan`.
    """
    scores = ops.cast(scores, "float32")
    # Sorts run on the last axis.
    scores = ops.transpose(scores)
    positives = ops.transpose(ops.cast(ops.cast(labels, "float32") > 0.5, "float32"))
    weights = ops.ones_like(scores)
    if sample_weight is not None:
        weights = weights * ops.cast(sample_weight, "float32")
    has_nan = ops.any(ops.logical_and(ops.isnan(scores), weights > 0), axis=-1)

    order = ops.argsort(-scores, axis=-1)
    scores = ops.take_along_axis(scores, order, axis=-1)
    weights = ops.take_along_axis(weights, order, axis=-1)
    gains = weights * ops.take_along_axis(positives, order, axis=-1)
    hits, seen = ops.cumsum(gains, axis=-1), ops.cumsum(weights, axis=-1)
    # Every example takes the precision at the end of its run of equal scores. Both
    # sums never fall, so that the end's value is the least one still to come.
    ends = ops.concatenate(
        [scores[:, :-1] != scores[:, 1:], ops.ones_like(scores[:, :1], dtype="bool")],
        axis=-1,
    )
    far = ops.full_like(hits, math.inf)
    hits_at_end = _least_to_come(ops.where(ends, hits, far))
    seen_at_end = _least_to_come(ops.where(ends, seen, far))
    precision = hits_at_end / ops.maximum(seen_at_end, 1e-30)
    totals = hits[:, -1]
    value = ops.sum(gains * precision, axis=-1) / ops.maximum(totals, 1e-30)
    missing = ops.logical_or(totals <= 0, has_nan)
    return ops.where(missing, ops.full_like(value, math.nan), value)


def _least_to_come(values):
    """Minimum over each entry and those after it, by doubling: log2(length) steps."""
    length, step = values.shape[-1], 1
    while step < length:
        shifted = ops.pad(
            values[:, step:], ((0, 0), (0, step)), constant_values=math.inf
        )
        values = ops.minimum(values, shifted)
        step *= 2
    return values


@keras.saving.register_keras_serializable(package="tokenlearner_keras")
class MeanAveragePrecision(keras.metrics.Metric):
    """Mean over the classes of the average precision, exact, for multi-label targets.

    It equals the mean of scikit-learn's `average_precision_score` over the classes.
    That needs every score at once, so that the metric keeps the labels and scores of up
    to `capacity` examples, 8 bytes a class and example. The state has a fixed shape and
    adds up over replicas (each writes to rows of its own), so that it works under
    `tf.distribute` strategies, in steps compiled by XLA and on every Keras backend.
    Under a strategy a replica has room for its even share of `capacity` and 256 more.

    Keras shows `result()` after each step, and each costs a sort of the buffer: on a
    large set, prefer `keras.Model.evaluate` once to this metric in `fit`, or
    `evaluate_videos`. During a step under a strategy Keras shows one replica's value;
    the value at the end is the whole set's.

    Args:
        num_classes: int. Size of the last axis of the targets and predictions.
        capacity: int. Number of examples there is room for, at least the size of the
            evaluation set. More examples than room end in an error from `result()`:
            no value is computed from a part of the set.
        without_positives: `"ignore"`, `"zero"` or `"nan"`. What a class without any
            positive example counts for: it is left out of the mean (the policy of the
            published Charades evaluations in Python), it counts as 0, or it makes the
            mean `nan` (the official Charades script). With `"ignore"` the mean over no
            class at all is `nan`.
        name: Name of the metric.
        dtype: Dtype of the result.

    Call arguments:
        y_true: Tensor of shape `(batch, num_classes)`; an entry over 0.5 is a positive.
        y_pred: Tensor of shape `(batch, num_classes)`: scores or logits. Logits are
            safer: float32 probabilities round to 1 and then tie.
        sample_weight: Optional tensor of shape `(batch,)`; 0 leaves an example out.

    Output:
        Scalar. `per_class()` returns the values before the mean.

    Raises:
        ValueError: at construction for an argument out of range; at `update_state` for
            other shapes; at `result` if more than `capacity` examples came (in a
            compiled step, where nothing can be raised, the value is `nan`).

    Example:

    >>> metric = MeanAveragePrecision(num_classes=2, capacity=4)
    >>> labels, scores = [[1, 0], [0, 1]], [[0.9, 0.2], [0.1, 0.6]]
    >>> metric.update_state(labels, scores)
    >>> float(metric.result())
    1.0
    """

    def __init__(
        self,
        num_classes,
        capacity=10_000,
        without_positives="ignore",
        name="mean_average_precision",
        dtype=None,
    ):
        super().__init__(name=name, dtype=dtype)
        self.num_classes = check_positive_int("num_classes", num_classes)
        self.capacity = check_positive_int("capacity", capacity)
        self.without_positives = check_choice(
            "without_positives", without_positives, EMPTY_CLASS_POLICIES
        )
        self._num_replicas = _num_replicas()
        self._rows = self.capacity
        if self._num_replicas > 1:
            self._rows = math.ceil(self.capacity / self._num_replicas) + REPLICA_MARGIN
        # The last row takes what there is no room for.
        total = self._rows * self._num_replicas + 1
        variable = {"initializer": "zeros", "dtype": "float32"}
        self.labels = self.add_variable((total, num_classes), name="labels", **variable)
        self.scores = self.add_variable((total, num_classes), name="scores", **variable)
        self.weights = self.add_variable((total,), name="weights", **variable)
        self.num_examples = self.add_variable(
            (), initializer="zeros", dtype="int32", name="num_examples"
        )
        self.num_overflows = self.add_variable(
            (), initializer="zeros", dtype="int32", name="num_overflows"
        )

    def update_state(self, y_true, y_pred, sample_weight=None):
        y_true = ops.cast(ops.convert_to_tensor(y_true), "float32")
        y_pred = ops.cast(ops.convert_to_tensor(y_pred), "float32")
        for name, tensor in (("y_true", y_true), ("y_pred", y_pred)):
            if len(tensor.shape) != 2 or tensor.shape[-1] != self.num_classes:
                raise ValueError(
                    f"`{name}` of metric '{self.name}' must have shape (batch, "
                    f"{self.num_classes}). Received: shape {tuple(tensor.shape)}"
                )
        batch = ops.shape(y_true)[0]
        weights = ops.ones_like(y_pred[:, 0])
        if sample_weight is not None:
            sample_weight = ops.cast(ops.convert_to_tensor(sample_weight), "float32")
            if len(sample_weight.shape) > 1:
                sample_weight = ops.reshape(sample_weight, (-1,))
            weights = weights * sample_weight
        position = _value(self.num_examples) + ops.arange(batch, dtype="int32")
        fits = position < self._rows
        rows = ops.where(
            fits,
            position * self._num_replicas + _replica_id(),
            ops.full_like(position, self._rows * self._num_replicas),
        )
        rows = ops.expand_dims(rows, -1)
        for variable, updates in (
            (self.labels, y_true),
            (self.scores, y_pred),
            (self.weights, weights),
        ):
            variable.assign(ops.scatter_update(_value(variable), rows, updates))
        excess = ops.sum(ops.cast(ops.logical_not(fits), "int32"))
        self.num_overflows.assign(_value(self.num_overflows) + excess)
        self.num_examples.assign(_value(self.num_examples) + batch)

    def per_class(self):
        """Returns the average precision of each class, `nan` without positives.

        Returns:
            Tensor of shape `(num_classes,)`.
        """
        overflows = _value(self.num_overflows)
        self._check_room(overflows)
        values = average_precision(
            _value(self.labels)[:-1],
            _value(self.scores)[:-1],
            _value(self.weights)[:-1],
        )
        return ops.where(overflows > 0, ops.full_like(values, math.nan), values)

    def result(self):
        values = self.per_class()
        if self.without_positives == "nan":
            return ops.cast(ops.mean(values), self.dtype)
        # Only classes without positives are left out: a `nan` score shows.
        positives = ops.any(
            ops.logical_and(
                _value(self.labels)[:-1] > 0.5,
                ops.expand_dims(_value(self.weights)[:-1], -1) > 0,
            ),
            axis=0,
        )
        total = ops.sum(ops.where(positives, values, ops.zeros_like(values)))
        if self.without_positives == "zero":
            return ops.cast(total / self.num_classes, self.dtype)
        count = ops.sum(ops.cast(positives, "float32"))
        mean = total / ops.maximum(count, 1.0)
        nan = ops.full_like(mean, math.nan)
        return ops.cast(ops.where(count > 0, mean, nan), self.dtype)

    def reset_state(self):
        for variable in self.variables:
            variable.assign(ops.zeros(variable.shape, dtype=variable.dtype))

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "num_classes": self.num_classes,
                "capacity": self.capacity,
                "without_positives": self.without_positives,
            }
        )
        return config

    def _check_room(self, overflows):
        """Raises if examples were lost, where values are known (not in a graph)."""
        if not _is_concrete(overflows) or int(overflows) == 0:
            return
        raise ValueError(
            f"Metric '{self.name}' received more examples than it has room for: pass "
            f"a larger `capacity`. Received: {int(_value(self.num_examples))} examples "
            f"with capacity={self.capacity}"
        )


def _value(variable):
    """The value as a tensor: this replica's, or the sum of all outside a replica."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # `keras.ops` would leave a distributed variable as it is.
        return tf.convert_to_tensor(variable.value)
    return ops.convert_to_tensor(variable.value)


def _is_concrete(tensor) -> bool:
    """Whether a tensor has a value now, that is, not inside a traced function."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.executing_eagerly()
    if keras.backend.backend() == "jax":
        import jax

        return not isinstance(tensor, jax.core.Tracer)
    return True


def _num_replicas() -> int:
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def _replica_id():
    """This replica's number; 0 outside `strategy.run`."""
    if keras.backend.backend() != "tensorflow":
        return 0
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return 0
    return context.replica_id_in_sync_group
