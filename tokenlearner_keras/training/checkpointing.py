import errno
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tokenlearner_keras.layers._checks import check_positive_int
from tokenlearner_keras.training.pipeline import (
    DataWait,
    distribute_dataset,
    is_shared_out,
    num_workers,
)

FORMAT = 1
PATTERN = re.compile(r"step-(\d{10})\.npz")
# What a file that was cut short, or changed on the disk, raises when it is read.
READ_ERRORS = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile)


class NonFiniteLossError(FloatingPointError):
    """Training met a loss or weights that are NaN or infinite, and was stopped."""


class WorkerLostError(RuntimeError):
    """Another worker of the cluster stopped answering."""


def train(
    model: keras.Model,
    make_dataset: Callable[[Any], Any],
    epochs: int,
    folder: str | os.PathLike,
    save_freq: int = 1000,
    keep: int = 2,
    steps_per_epoch: int | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    data_wait: DataWait | None = None,
    **fit_arguments: Any,
) -> keras.callbacks.History:
    """Trains with `model.fit` so that a run can be killed at any moment.

    Call it again with the same arguments, and it goes on from the last checkpoint in
    `folder`: the same weights, optimizer, seeds and metrics, at the same step inside
    the epoch, on the data that come next. On one CPU device every later number is the
    same to the last bit as in a run that was not interrupted.

    - Every `save_freq` steps, and at the end, a checkpoint is written beside the others
      and then renamed, so there is never half a file under a checkpoint's name.
    - A checkpoint that cannot be read is named in a warning, and the one before it is
      used.
    - If a checkpoint cannot be written (a full disk), training goes on with a warning,
      and the older checkpoints stay. The last checkpoint must succeed.
    - If the loss or a weight is not finite, training stops with `NonFiniteLossError`,
      which names the step. The model then has the last good weights, and no checkpoint
      is ever written of others.

    With several workers all of them must see the same `folder`; the first one writes.

    Args:
        model: A compiled and built `keras.Model`, on the TensorFlow backend.
        make_dataset: Function from the epoch, a scalar int64 tensor, to a finite,
            batched `tf.data.Dataset` that depends on nothing else: use the epoch as a
            seed, as in `data.shuffle(1000, seed=epoch).batch(32)`. It is traced once.
        epochs: int. Number of epochs.
        folder: Folder of the checkpoints. Made if it is not there.
        save_freq: int. Steps between checkpoints. Under `steps_per_execution`, the
            first execution that reaches the interval saves.
        keep: int. Number of checkpoints that stay on the disk, at least 2, so that one
            can be corrupted.
        steps_per_epoch: int or `None`. `None` counts the batches of `make_dataset(0)`.
        callbacks: More callbacks for `fit`. Those that keep a state of their own, such
            as `EarlyStopping`, start afresh when a run is resumed.
        data_wait: A `DataWait` that is to watch the data, and is told of the steps.
        **fit_arguments: Passed to `fit`: `validation_data`, `verbose`, ...

    Returns:
        The `keras.callbacks.History` of the whole run, with the epochs before it was
        resumed.

    Raises:
        ValueError: for an argument out of range, a model that is not built or compiled,
            a data set of unknown length without `steps_per_epoch`, checkpoints of
            another model, or a folder in which no checkpoint can be read.
        PermissionError, OSError: before the first step, if `folder` cannot be written;
            after the last, if the last checkpoint could not be written.
        NonFiniteLossError: if the loss or a weight is not finite.
        WorkerLostError: if another worker stops answering.

    Example:

    ```python
    def make_dataset(epoch):
        data = tf.data.Dataset.from_tensor_slices((images, labels))
        return data.shuffle(10_000, seed=epoch).batch(64, drop_remainder=True)

    tlk.training.train(model, make_dataset, epochs=20, folder="run", save_freq=500)
    ```
    """
    check_positive_int("epochs", epochs)
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "`train` needs the TensorFlow backend of Keras. "
            f"Received: backend={keras.backend.backend()!r}"
        )
    if not callable(make_dataset):
        raise ValueError(
            "Argument `make_dataset` must be a function from the epoch to a "
            f"`tf.data.Dataset`. Received: make_dataset={make_dataset!r}"
        )
    for name in ("x", "initial_epoch", "shuffle"):
        if name in fit_arguments:
            raise ValueError(
                f"Argument `{name}` is set by `train` itself. "
                f"Received: {name}={fit_arguments[name]!r}"
            )
    if not (model.built and model.compiled):
        raise ValueError(
            "Argument `model` must be built and compiled. "
            f"Received: built={model.built}, compiled={model.compiled}"
        )
    import tensorflow as tf

    first_epoch = make_dataset(tf.constant(0, "int64"))
    length = int(first_epoch.cardinality())
    if steps_per_epoch is None:
        if length <= 0:
            raise ValueError(
                "Argument `steps_per_epoch` must be given for a data set whose number "
                f"of batches is unknown or infinite. Received: {length} batches"
            )
        steps_per_epoch = length
    check_positive_int("steps_per_epoch", steps_per_epoch)
    if 0 <= length < steps_per_epoch:
        raise ValueError(
            "Argument `steps_per_epoch` must be at most the number of batches of "
            f"`make_dataset`, {length}. Received: steps_per_epoch={steps_per_epoch}"
        )
    if steps_per_epoch % model.steps_per_execution:
        raise ValueError(
            "`steps_per_execution` must divide `steps_per_epoch`, so that an execution "
            "does not run into the next epoch. Received: steps_per_execution="
            f"{model.steps_per_execution}, steps_per_epoch={steps_per_epoch}"
        )

    def one_epoch(epoch):
        graph = tf.compat.v1.get_default_graph()
        if graph.seed == 0:
            # TensorFlow compares the pair of this seed and an operation's with (0, 0),
            # which fails for a seed that is a tensor. Any other seed ends the
            # comparison at once. It holds for this function alone.
            tf.random.set_seed(1)
        return make_dataset(epoch).take(steps_per_epoch)

    def stream_from(epoch, step):
        stream = tf.data.Dataset.range(epoch, max(epochs, epoch + 1)).flat_map(
            one_epoch
        )
        return (stream.skip(step) if step else stream).prefetch(tf.data.AUTOTUNE)

    # Optimizer, loss and metrics make their variables here, not at the first step.
    with model.distribute_strategy.scope():
        model._symbolic_build(data_batch=stream_from(0, 0).element_spec)
    state = TrainingState(folder, keep=keep)
    survivor = _Survivor(model, state, save_freq, steps_per_epoch, epochs)
    logs_before = list(survivor.logs)
    stream = stream_from(survivor.epoch, survivor.step)
    if data_wait is not None:
        stream = data_wait.watch(stream)
        callbacks = [data_wait, *callbacks]
    if is_shared_out(first_epoch):
        stream = distribute_dataset(stream, model.distribute_strategy)
    try:
        history = model.fit(
            stream,
            epochs=epochs,
            initial_epoch=survivor.epoch,
            steps_per_epoch=steps_per_epoch,
            shuffle=False,
            # Last, so that the others have seen a step before it is saved.
            callbacks=[*callbacks, survivor],
            **fit_arguments,
        )
    except tf.errors.OpError as error:
        workers, worker = num_workers(model.distribute_strategy)
        if workers == 1 or not isinstance(error, _lost_worker_errors()):
            raise
        steps = [int(path.stem.removeprefix("step-")) for path in state.paths()]
        raise WorkerLostError(
            f"Worker {worker} of {workers} lost another worker (or the network to it), "
            "and stops. Start all workers again with the same command: they go on from "
            f"{f'step {steps[0]}' if steps else 'the beginning'}, the last checkpoint "
            f"in '{state.folder}'. TensorFlow says: {str(error).splitlines()[0]}"
        ) from error
    history.epoch = [*range(len(logs_before)), *history.epoch]
    for name in dict.fromkeys(name for logs in logs_before for name in logs):
        before = [logs[name] for logs in logs_before if name in logs]
        history.history[name] = before + history.history.get(name, [])
    return history


class TrainingState:
    """A folder of checkpoints, each one file with all arrays of a training run.

    Args:
        folder: Path of the folder. Made if it is not there.
        keep: int. Number of checkpoints that stay on the disk, at least 2.

    Raises:
        ValueError: if `keep` is less than 2.
        OSError: if the folder cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2):
        if check_positive_int("keep", keep) < 2:
            raise ValueError(
                "Argument `keep` must be at least 2, so that a corrupted checkpoint "
                f"has one before it. Received: keep={keep}"
            )
        self.folder = Path(folder)
        self.keep = keep
        probe = self.folder / f".probe-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise type(error)(
                error.errno,
                f"The folder of checkpoints cannot be written: {error.strerror}",
                str(self.folder),
            ) from error

    def paths(self) -> list[Path]:
        """The checkpoints, the newest first."""
        found = [p for p in self.folder.iterdir() if PATTERN.fullmatch(p.name)]
        return sorted(found, reverse=True)

    def save(self, step: int, arrays: Sequence[np.ndarray], about: dict) -> Path:
        """Writes a checkpoint beside the others, and renames it when it is whole.

        Args:
            step: int. Number of steps since the start.
            arrays: The arrays, of any dtype that NumPy or `ml_dtypes` has.
            about: What else to keep, as JSON can hold it.

        Returns:
            The path of the checkpoint.
        """
        path = self.folder / f"step-{step:010d}.npz"
        try:
            self._write(path, arrays, about)
        except OSError as error:
            older = self.paths()[1:]
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not older:
                raise
            # Make room, but never at the price of the newest.
            for old in older:
                old.unlink()
            self._write(path, arrays, about)
        for old in self.paths()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def _write(self, path, arrays, about):
        entries = {}
        dtypes = []
        for index, array in enumerate(arrays):
            array = np.asarray(array)
            dtypes.append(array.dtype.name)
            if array.dtype.kind not in "biuf":  # bfloat16 and float8, for NumPy
                array = array.view(f"u{array.dtype.itemsize}")
            entries[f"{index:06d}"] = array
        about = json.dumps({**about, "format": FORMAT, "dtypes": dtypes})
        entries["about"] = np.frombuffer(about.encode(), "uint8")
        for leftover in self.folder.glob(".step-*.part"):  # of a run that was killed
            leftover.unlink(missing_ok=True)
        part = self.folder / f".{path.name}.part"
        try:
            with open(part, "wb") as file:
                np.savez(file, **entries)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        directory = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def load(self) -> tuple[list[np.ndarray], dict] | None:
        """Reads the newest checkpoint that is whole.

        Returns:
            Its arrays and what else was kept, or `None` if there is no checkpoint.

        Raises:
            ValueError: if there are checkpoints and none can be read.
        """
        paths = self.paths()
        for index, path in enumerate(paths):
            try:
                return self._read(path)
            except READ_ERRORS as error:
                reason = f"{type(error).__name__}: {error}"
                if index + 1 == len(paths):
                    raise ValueError(
                        f"No checkpoint in '{self.folder}' can be read: the last tried "
                        f"was '{path.name}' ({reason}). Move the folder away to start "
                        "afresh."
                    ) from error
                warnings.warn(
                    f"Checkpoint '{path}' is corrupted ({reason}). Falling back to the "
                    f"one before, '{paths[index + 1].name}'.",
                    stacklevel=2,
                )
        return None

    @staticmethod
    def _read(path):
        import ml_dtypes

        # Reading a member of the archive compares its checksum.
        with np.load(path, allow_pickle=False) as archive:
            about = json.loads(archive["about"].tobytes())
            if about["format"] != FORMAT:
                raise ValueError(f"format {about['format']}, expected {FORMAT}")
            arrays = []
            for index, name in enumerate(about["dtypes"]):
                array = archive[f"{index:06d}"]
                if array.dtype.name != name:
                    array = array.view(getattr(ml_dtypes, name))
                arrays.append(array)
        return arrays, about


class _Survivor(keras.callbacks.Callback):
    """Saves and restores the whole state of `model.fit`."""

    def __init__(self, model, state, save_freq, steps_per_epoch, epochs):
        super().__init__()
        self.state = state
        self.save_freq = check_positive_int("save_freq", save_freq)
        self.steps_per_epoch = steps_per_epoch
        self.epochs = epochs
        self.epoch, self.step = 0, 0  # where to go on
        self.logs = []  # of the epochs before
        self.metrics = None  # of the epoch in which the run was saved
        self._pending = None  # the loss of a step, not yet looked at
        self._save_error = None
        self._restore(model)

    # The state.

    @staticmethod
    def _variables(model):
        """All state less that of the metrics, each once."""
        variables = {id(v): v for v in [*model.variables, *model.optimizer.variables]}
        metrics = {id(v) for v in model.metrics_variables}
        return [v for key, v in variables.items() if key not in metrics]

    def _restore(self, model):
        loaded = self.state.load()
        if loaded is None:
            return
        arrays, about = loaded
        variables = self._variables(model)
        # Names are not compared: automatic ones differ between processes.
        expected = [list(variable.shape) for variable in variables]
        found = about["shapes"]
        if found != expected:
            index = next(
                (
                    i
                    for i, pair in enumerate(zip(expected, found))
                    if len({*map(str, pair)}) > 1
                ),
                min(len(expected), len(found)),
            )
            of = f" ('{variables[index].path}')" if index < len(variables) else ""
            raise ValueError(
                f"The checkpoint of step {about['total_steps']} in "
                f"'{self.state.folder}' is of another model or optimizer: it has "
                f"{len(found)} variables, expected {len(expected)}; the first that "
                f"differs is number {index}{of}"
            )
        if about["steps_per_epoch"] != self.steps_per_epoch:
            raise ValueError(
                "Argument `steps_per_epoch` must be that of the run to resume, "
                f"{about['steps_per_epoch']}. Received: {self.steps_per_epoch}"
            )
        for variable, array in zip(variables, arrays):
            variable.assign(array)
        self.metrics = arrays[len(variables) :]
        self.epoch, self.step = about["epoch"], about["step"]
        self.logs = about["logs"]

    def _save(self, epoch, step):
        model = self.model
        variables = self._variables(model)
        # Every worker reads: the value of a metric is a sum over all of them.
        arrays = [_array(v) for v in [*variables, *model.metrics_variables]]
        for variable, array in zip(variables, arrays):
            is_float = keras.backend.is_float_dtype(variable.dtype)
            if is_float and not np.all(np.isfinite(array.astype("float32"))):
                self._stop(epoch, step, f"variable '{variable.path}'")
        if num_workers(model.distribute_strategy)[1] != 0:
            return  # the first worker writes for all
        about = {
            "epoch": epoch,
            "step": step,
            "total_steps": epoch * self.steps_per_epoch + step,
            "steps_per_epoch": self.steps_per_epoch,
            "shapes": [list(variable.shape) for variable in variables],
            "logs": self.logs,
        }
        try:
            self.state.save(about["total_steps"], arrays, about)
            self._save_error = None
        except OSError as error:
            self._save_error = error
            warnings.warn(
                f"The checkpoint of step {about['total_steps']} could not be written "
                f"({type(error).__name__}: {error}). Training goes on; "
                f"{len(self.state.paths())} older checkpoints are kept.",
                stacklevel=2,
            )

    # Hooks of `fit`.

    def on_train_begin(self, logs=None):
        self._last_saved = self.epoch * self.steps_per_epoch + self.step

    def on_epoch_begin(self, epoch, logs=None):
        self._current = epoch
        if epoch != self.epoch or self.metrics is None:
            return
        # `fit` has just reset the metrics.
        saved = self.metrics
        self.metrics = None
        variables = self.model.metrics_variables
        if self.step and [v.shape for v in variables] == [a.shape for a in saved]:
            for variable, array in zip(variables, saved):
                variable.assign(array)
        if self.step:
            self._skip_steps()

    def _skip_steps(self):
        """Lets `fit` count the steps that are done, without data and without work."""
        model, function = self.model, self.model.train_function
        remaining = self.step

        def skip(iterator):
            nonlocal remaining
            remaining -= model.steps_per_execution
            if remaining <= 0:
                model.train_function = function
            return model.get_metrics_result()

        model.train_function = skip

    def on_train_batch_end(self, batch, logs=None):
        step = min(batch + 1, self.steps_per_epoch)
        total = self._current * self.steps_per_epoch + step
        if total <= self._last_saved:
            return  # a step that was done before the run was resumed
        # The loss of the step before: this one may still be computed.
        self._check_pending()
        self._pending = step, (logs or {}).get("loss")
        if total - self._last_saved >= self.save_freq:
            self._check_pending()
            self._save(self._current, step)
            self._last_saved = total

    def on_epoch_end(self, epoch, logs=None):
        self._check_pending()
        self.logs.append({k: float(np.mean(v)) for k, v in (logs or {}).items()})
        if epoch + 1 == self.epochs:
            # Before `fit` replaces the weights by their moving averages.
            self._save(epoch + 1, 0)

    def on_train_end(self, logs=None):
        if self._save_error is not None:
            raise self._save_error

    def _check_pending(self):
        if self._pending is None:
            return
        step, loss = self._pending
        self._pending = None
        if loss is not None and not np.all(np.isfinite(np.asarray(loss))):
            self._stop(self._current, step, "the loss")

    def _stop(self, epoch, step, what):
        total = epoch * self.steps_per_epoch + step
        self.model.stop_training = True
        loaded = self.state.load()
        kept = "There is no checkpoint yet to go back to"
        if loaded is not None:
            arrays, about = loaded
            for variable, array in zip(self._variables(self.model), arrays):
                variable.assign(array)
            kept = (
                "The model has the last good weights, those of step "
                f"{about['total_steps']} in '{self.state.folder}'"
            )
        raise NonFiniteLossError(
            f"At step {total} (epoch {epoch + 1}, step {step} of "
            f"{self.steps_per_epoch}), {what} is NaN or infinite. {kept}."
        )


def _array(variable):
    """The value of a Keras variable, also of one that is a sum over several workers."""
    value = variable.value
    # NumPy cannot read the variables of `tf.distribute` by itself.
    read = getattr(value, "read_value", None)
    return keras.ops.convert_to_numpy(value if read is None else read())


def _lost_worker_errors():
    import tensorflow as tf

    names = ("Unavailable", "Aborted", "Cancelled", "DeadlineExceeded", "Internal")
    return tuple(getattr(tf.errors, f"{name}Error") for name in names)
