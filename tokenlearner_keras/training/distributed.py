import contextlib
import weakref

import keras
from keras import tree

from tokenlearner_keras.training.pipeline import is_shared_out, num_workers


def distributed(model: keras.Model) -> keras.Model:
    """Lets a model train on many devices with XLA and `steps_per_execution`.

    Under a `tf.distribute` strategy with several replicas, Keras's own `fit` fails with
    `jit_compile=True` (one XLA program would span all devices), fails with
    `steps_per_execution > 1`, and fails under `MultiWorkerMirroredStrategy`. This
    function replaces the steps of `model` by ones in which each replica runs two XLA
    programs on its own device, with the sum over the replicas between them:

    1. forward pass, loss, backward pass;
    2. the sum over all replicas of gradients and layer states, which the first program
       has joined to one vector (not compiled);
    3. the optimizer.

    It sets Keras's hooks on this instance alone: the model keeps its class, its weights
    and its compiled state, and it saves, reloads and exports as before. Everything that
    `compile` and `fit` offer stays as it is, with these differences, all towards the
    result of one device that trains on the whole batch:

    - Gradients are clipped after they were summed, not before.
    - A last batch that does not split evenly counts each example once. Keras counts
      each replica once. (Losses with a `"sum"` or `"mean_with_sample_weight"`
      reduction are left to Keras.)
    - Layer states, such as moving averages of BatchNormalization, are averaged over
      the replicas. Keras lets each replica drift and saves the first.
    - `jit_compile="auto"` uses XLA on accelerators. Keras never does under a strategy.

    Where Keras's own steps do all of this (one device, `TPUStrategy`, another backend
    than TensorFlow, `run_eagerly=True`), they are used.

    Args:
        model: A `keras.Model` with Keras's own `train_step` and `test_step`, made
            inside the scope of the strategy. Call this function before or after
            `compile`, but before `fit`.

    Returns:
        The same object as `model`.

    Raises:
        ValueError: for another object than a Keras model, a model with its own
            `train_step` or `test_step`, a model made outside of the scope of the
            current strategy, or a strategy that Keras cannot train under.

    Example:

    ```python
    strategy = tlk.training.get_strategy("mirrored")
    with strategy.scope():
        model = tlk.training.distributed(tlk.models.vit("B/16", num_tokens=8))
        model.compile("adamw", loss, jit_compile=True, steps_per_execution=10)
    model.fit(dataset, epochs=10)
    ```
    """
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Argument `model` must be a `keras.Model`. Received: model={model!r}"
        )
    if keras.backend.backend() != "tensorflow":
        return model
    import tensorflow as tf

    # Not the property, which is the current strategy for a model made outside of all.
    made_under = model._distribute_strategy
    if tf.distribute.has_strategy() and made_under is not tf.distribute.get_strategy():
        made = type(made_under).__name__ if made_under else "no strategy"
        raise ValueError(
            "Argument `model` must be made inside the scope of the strategy it trains "
            f"under. Received: model='{model.name}' made under {made}, inside the "
            f"scope of {type(tf.distribute.get_strategy()).__name__}"
        )
    strategy = model.distribute_strategy
    if isinstance(strategy, tf.distribute.experimental.ParameterServerStrategy):
        raise ValueError(
            "Keras 3 does not train under `ParameterServerStrategy`. Use "
            "`MirroredStrategy`, `MultiWorkerMirroredStrategy` or `TPUStrategy`."
        )
    if not isinstance(
        strategy,
        (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy),
    ):
        return model
    for name in ("train_step", "test_step"):
        if getattr(type(model), name) is not getattr(keras.Model, name):
            raise ValueError(
                f"Argument `model` must have Keras's own `{name}`: a step of one's own "
                "cannot be split into the part of one device and the part of all. "
                f"Received: model='{model.name}' of class {type(model).__name__}, "
                f"which defines `{name}`"
            )
    _ReplicaSteps(model)
    return model


class _ReplicaSteps:
    """The steps of a model under a mirrored strategy, set as the model's hooks.

    `model.train_step` and `model.test_step` run once for each replica, inside
    `strategy.run`. What they compile belongs to one device, so XLA accepts it.
    """

    def __init__(self, model):
        self.model = model
        self.strategy = model.distribute_strategy
        self.states = []  # variables that the layers, losses or metrics assign
        self.layout = []  # what the vectors hold that are summed over the replicas
        self.taken = weakref.WeakKeyDictionary()  # steps taken from an iterator
        model.train_step = self.train_step
        model.test_step = self.test_step
        model._make_function = self.make_function
        model._maybe_symbolic_build = self.symbolic_build
        model._resolve_auto_jit_compile = self.resolve_auto_jit_compile

    def train_step(self, data):
        import tensorflow as tf

        model = self.model
        if model.run_eagerly:
            return type(model).train_step(model, data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        result = self.forward(x, y, sample_weight, training=True)
        context = tf.distribute.get_replica_context()
        summed = context.all_reduce(tf.distribute.ReduceOp.SUM, result["summed"])
        replica = self._replica_index(context)
        self.update(summed, result["states"], replica=replica)
        return self._update_metrics(x, y, sample_weight, result)

    def test_step(self, data):
        import tensorflow as tf

        model = self.model
        if model.run_eagerly:
            return type(model).test_step(model, data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        result = self.forward(x, y, sample_weight, training=False)
        index = self._replica_index(tf.distribute.get_replica_context())
        for key, value in result["states"].items():
            self._local(self.states[int(key)], index).assign(value)
        return self._update_metrics(x, y, sample_weight, result)

    def _update_metrics(self, x, y, sample_weight, result):
        import tensorflow as tf

        model = self.model
        model._loss_tracker.update_state(
            result["loss"], sample_weight=tf.shape(_first_tensor(x))[0]
        )
        return model.compute_metrics(
            x, y, result["y_pred"], sample_weight=sample_weight
        )

    def _forward(self, x, y, sample_weight, training):
        """Outputs, loss, gradients and new states of one replica, on its device."""
        import tensorflow as tf

        model = self.model
        replicas = self.strategy.num_replicas_in_sync
        first = _first_tensor(x)
        with _recording_scope() as scope, tf.GradientTape() as tape:
            if model._call_has_training_arg:
                y_pred = model(x, training=training)
            else:
                y_pred = model(x)
            loss = model._compute_loss(
                x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
            )
            scaled = loss
            if training and model.optimizer is not None:
                scaled = model.optimizer.scale_loss(loss)
        result = {
            "y_pred": y_pred,
            # As `compute_loss` divides by the number of replicas.
            "loss": loss * replicas,
            "states": {},
        }
        averaged = set()
        if training:
            # Weights of the mean over replicas. All are 1 where the batch is static.
            if first.shape[0] is None and self._losses_are_means():
                share = tf.cast(tf.shape(first)[0], "float32")
            else:
                share = tf.constant(1.0)
            averaged = {
                id(v)
                for v in model.non_trainable_variables
                if keras.backend.is_float_dtype(v.dtype)
            }

            def weighted(value, scale):
                value = tf.convert_to_tensor(value)
                product = value * tf.cast(share * scale, value.dtype)
                # An empty batch has no gradient, but its 0 / 0 would spread.
                return tf.where(share > 0, product, tf.zeros_like(product))

            weights = model.trainable_weights
            gradients = tape.gradient(scaled, weights)
            summed = {("share", 0): tf.reshape(share, [])}
            for index, gradient in enumerate(gradients):
                if gradient is not None:
                    value = weighted(gradient, replicas)
                    summed["gradient", index] = tf.reshape(value, weights[index].shape)
        for variable, value in scope.updates.values():
            key = self._state_key(variable)
            if id(variable) in averaged:
                value = tf.reshape(weighted(value, 1), variable.shape)
                summed["average", int(key)] = value
            else:
                result["states"][key] = value
        if training:
            # One vector in place of hundreds of tensors: outside of XLA, the host
            # would spend longer on the tensors than the devices on the sum.
            result["summed"], self.layout = _flatten(summed)
        return result

    def _update(self, summed, states, replica):
        """Applies the summed gradients and states to one replica, on its device."""
        import tensorflow as tf

        model = self.model
        summed = _unflatten(summed, self.layout)
        count = summed.pop(("share", 0))
        means = {k: value / tf.cast(count, value.dtype) for k, value in summed.items()}
        weights = model.trainable_weights
        gradients = [means.get(("gradient", index)) for index in range(len(weights))]
        # All of this belongs to one device. The optimizer need not know of others.
        with _local_scope(model, lambda v: self._local(v, replica)):
            if weights:
                model.optimizer.apply(gradients, weights)
            for (kind, index), value in means.items():
                if kind == "average":
                    self.states[index].assign(value)
            for key, value in states.items():
                self.states[int(key)].assign(value)

    def make_function(self, step_function):
        """As Keras's `_make_function`, with XLA inside of `strategy.run`."""
        import tensorflow as tf

        model, strategy = self.model, self.strategy
        if not model.run_eagerly:
            jit = bool(model.jit_compile)
            self._check_synchronized(jit)
            # Without XLA the layers may communicate, so nothing stands around them.
            self.forward = self._forward
            if jit:
                self.forward = tf.function(
                    self._forward, jit_compile=True, autograph=False
                )
            self.update = tf.function(self._update, jit_compile=jit, autograph=False)

        def run_step(data):
            data = tree.map_structure(
                lambda t: None if isinstance(t, tf.experimental.Optional) else t, data
            )
            return strategy.run(step_function, args=(data,))

        def reduce(outputs):
            return tree.map_structure(
                lambda t: strategy.reduce("MEAN", t, axis=None), outputs
            )

        def one_step(data):
            return reduce(run_step(data))

        def known_steps(iterator, steps):
            """`steps` steps: there are data for all of them but perhaps the first."""
            # The first step stands outside of the loop: it says what a step returns,
            # and ends the epoch if there are no data.
            outputs = run_step(iterator.get_next())
            if model.steps_per_execution == 1:
                return reduce(outputs)
            # The metrics need to be read once only, unless a model returns others.
            is_plain = type(model).compute_metrics is keras.Model.compute_metrics
            outputs = () if is_plain else reduce(outputs)

            def next_step(step, outputs):
                outputs = run_step(iterator.get_next())
                return step + 1, () if is_plain else reduce(outputs)

            _, outputs = tf.while_loop(
                lambda step, outputs: step < steps,
                next_step,
                (tf.constant(1), outputs),
            )
            if is_plain:
                outputs = reduce(strategy.run(model.get_metrics_result))
            return outputs

        def many_steps(iterator):
            """Up to `steps_per_execution` steps, of an iterator of unknown length.

            Slower: the loop carries a batch, which TensorFlow copies between devices.
            """
            outputs = one_step(iterator.get_next())

            def has_data(step, outputs, data):
                return tf.logical_and(
                    step < model.steps_per_execution, data.has_value()
                )

            def next_step(step, outputs, data):
                outputs = one_step(data.get_value())
                data = tf.cond(
                    step + 1 < model.steps_per_execution,
                    iterator.get_next_as_optional,
                    lambda: data,
                )
                return step + 1, outputs, data

            _, outputs, _ = tf.while_loop(
                has_data,
                next_step,
                (tf.constant(1), outputs, iterator.get_next_as_optional()),
            )
            return outputs

        if not model.run_eagerly:
            one_step = tf.function(one_step, reduce_retracing=True, autograph=False)
            many_steps = tf.function(many_steps, reduce_retracing=True, autograph=False)
            known_steps = tf.function(
                known_steps, reduce_retracing=True, autograph=False
            )

        def function(iterator):
            if isinstance(
                iterator, (tf.data.Iterator, tf.distribute.DistributedIterator)
            ):
                steps = self._steps_ahead(iterator)
                if steps is None:
                    return many_steps(iterator)
                return known_steps(iterator, tf.constant(steps))
            outputs = None
            for _, data in zip(range(model.steps_per_execution), iterator):
                outputs = one_step(data)
            return outputs

        return function

    def _steps_ahead(self, iterator):
        """The steps of the next execution, `None` if only the data will tell."""
        import tensorflow as tf

        steps = self.model.steps_per_execution
        length = getattr(iterator, "_cardinality", None)
        if steps == 1 or length == tf.data.INFINITE_CARDINALITY:
            return steps
        # Workers may hold different numbers of batches.
        if length is None or length < 0 or num_workers(self.strategy)[0] > 1:
            return None
        taken = self.taken.get(iterator, 0)
        self.taken[iterator] = taken + steps
        return max(min(steps, int(length) - taken), 1)

    def symbolic_build(self, iterator=None, data_batch=None):
        """Builds all state from the shapes of the data, without reading any.

        Keras reads a batch, which moves a shuffled dataset on by one epoch, and fails
        on the batch of several workers.
        """
        import tensorflow as tf

        if iterator is not None:
            self._check_shared_once(iterator)
            data_batch = iterator._distributed_dataset.element_spec

        def as_spec(spec):
            if isinstance(spec, (tf.OptionalSpec, tf.NoneTensorSpec)):
                return None
            # The specification of a distributed value holds one for each replica.
            specs = getattr(spec, "_value_specs", None)
            return specs[0] if specs else spec

        data_batch = tree.map_structure(as_spec, data_batch)
        with self.strategy.scope():
            self.model._symbolic_build(data_batch=data_batch)

    def _check_shared_once(self, iterator):
        dataset = iterator._distributed_dataset
        original = getattr(dataset, "_original_dataset", None)
        if original is None or num_workers(self.strategy)[0] == 1:
            return
        if is_shared_out(original):
            raise ValueError(
                "A dataset that holds this worker's share alone, such as one of "
                "`make_pipeline` or with `AutoShardPolicy.OFF`, must be passed through "
                "`tlk.training.distribute_dataset`, or the steps of an epoch are "
                f"counted wrongly. Received: {original!r}"
            )

    def resolve_auto_jit_compile(self):
        """As Keras's rule for one device."""
        import tensorflow as tf

        accelerators = [
            device
            for device in tf.config.list_logical_devices()
            if device.device_type in ("GPU", "TPU")
        ]
        return bool(accelerators) and all(
            layer.supports_jit for layer in self.model._flatten_layers()
        )

    def _check_synchronized(self, jit):
        names = [
            layer.name
            for layer in self.model._flatten_layers()
            if getattr(layer, "synchronized", False)
        ]
        if jit and names:
            raise ValueError(
                "A layer that communicates in its forward pass cannot be compiled for "
                "one device. Compile the model with `jit_compile=False`, or use "
                f"`synchronized=False`. Received: jit_compile=True, layers={names}"
            )

    def _losses_are_means(self):
        """Whether the loss of a batch is the mean of the losses of its examples."""
        model = self.model
        if type(model).compute_loss is not keras.Model.compute_loss:
            return False
        return all(
            getattr(loss, "reduction", "mean") in ("mean", "sum_over_batch_size")
            for loss in tree.flatten(model.loss)
        )

    def _state_key(self, variable):
        for index, known in enumerate(self.states):
            if known is variable:
                return str(index)
        self.states.append(variable)
        return str(len(self.states) - 1)

    def _replica_index(self, context):
        """Place of this replica among those of this process."""
        import tensorflow as tf

        index = int(tf.get_static_value(context.replica_id_in_sync_group))
        return index % len(self.strategy.extended.worker_devices)

    def _local(self, variable, replica):
        """The component of a Keras variable on the device of a replica."""
        return self.strategy.experimental_local_results(variable._value)[replica]


def _flatten(values):
    """Joins tensors to one vector for each dtype; returns these and what they hold."""
    import tensorflow as tf

    parts, layout = {}, []
    for key, value in values.items():
        # Sums of half precision would be rounded, and not all devices have them.
        dtype = "float64" if value.dtype == tf.float64 else "float32"
        parts.setdefault(dtype, []).append(tf.reshape(tf.cast(value, dtype), [-1]))
        layout.append((key, dtype, value.shape, value.dtype))
    return {dtype: tf.concat(part, 0) for dtype, part in parts.items()}, layout


def _unflatten(vectors, layout):
    """The inverse of `_flatten`."""
    import tensorflow as tf

    values = {}
    for name, vector in vectors.items():
        held = [entry for entry in layout if entry[1] == name]
        sizes = [shape.num_elements() for _, _, shape, _ in held]
        for part, entry in zip(tf.split(vector, sizes), held):
            key, _, shape, dtype = entry
            values[key] = tf.cast(tf.reshape(part, shape), dtype)
    return values


def _first_tensor(x):
    return next(tensor for tensor in tree.flatten(x) if tensor is not None)


def _recording_scope():
    """A `StatelessScope` that keeps the assigned variables with their values."""

    class RecordingScope(keras.StatelessScope):
        def __init__(self):
            super().__init__(collect_losses=True)
            self.updates = {}

        def add_update(self, update):
            super().add_update(update)
            self.updates[id(update[0])] = update

        def get_current_value(self, variable):
            return self.state_mapping.get(id(variable), variable._value)

    return RecordingScope()


@contextlib.contextmanager
def _local_scope(model, local):
    """Inside, the model and its optimizer know one device alone, as without strategy.

    Args:
        model: The model.
        local: Function from a Keras variable to its `tf.Variable` on this device.
    """
    import tensorflow as tf

    class LocalScope(keras.StatelessScope):
        def add_update(self, update):
            variable, value = update
            local(variable).assign(tf.cast(value, variable._dtype))

        def get_current_value(self, variable):
            return local(variable)

    # The optimizer's merges across replicas are no-ops outside of a strategy.
    graph = tf.compat.v1.get_default_graph()
    stack = graph._distribution_strategy_stack
    graph._distribution_strategy_stack = []
    optimizers = list(_optimizers(model.optimizer))
    strategies = [optimizer._distribution_strategy for optimizer in optimizers]
    try:
        for optimizer in optimizers:
            optimizer._distribution_strategy = tf.distribute.get_strategy()
        with LocalScope():
            yield
    finally:
        for optimizer, strategy in zip(optimizers, strategies):
            optimizer._distribution_strategy = strategy
        graph._distribution_strategy_stack = stack


def _optimizers(optimizer):
    """Yields an optimizer and the optimizers inside of it."""
    yield optimizer
    for value in list(vars(optimizer).values()):
        values = value.values() if isinstance(value, dict) else tree.flatten(value)
        for inner in values:
            if isinstance(inner, keras.optimizers.Optimizer):
                yield from _optimizers(inner)
