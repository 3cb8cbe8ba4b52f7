"""What the tokens look at, written to TensorBoard during training."""

from collections.abc import Sequence

import keras
import numpy as np

from tokenlearner_keras.layers._checks import check_positive_int
from tokenlearner_keras.visualization.maps import attention_model
from tokenlearner_keras.visualization.pictures import attention_grid
from tokenlearner_keras.visualization.token_metrics import token_statistics


class AttentionMapsCallback(keras.callbacks.Callback):
    """Writes what the tokens look at to TensorBoard while a model trains.

    Beside the pictures it writes three numbers that show tokens that are dead or
    duplicates (see `token_statistics`): `attention_maps_entropy` (mean over the
    tokens), `attention_maps_entropy_max` (near 1: a dead token) and
    `attention_maps_overlap_max` (near 1: two tokens alike). They join the logs of the
    epoch, so that `History` and the callbacks that come later have them as well.

    Args:
        log_dir: Folder of the event files: that of `keras.callbacks.TensorBoard`, say.
        images: Array of the few images or clips to show, as the model takes them.
        layer: Name of the `TokenLearner`, as in `attention_tensors`. `None` takes the
            first.
        tokens: Indices of the tokens to show. `None` shows all.
        every: int. Epochs from one picture to the next; the last epoch of a run that
            is not a multiple has none.
        value_range: As for `attention_overlay`.
        columns: As for `attention_grid`.
        name: Name of the pictures in TensorBoard, with which the names of the numbers
            begin.
        **kwargs: Further arguments of `attention_overlay`.
    """

    def __init__(
        self,
        log_dir: str,
        images,
        layer: str | None = None,
        tokens: Sequence[int] | None = None,
        every: int = 1,
        value_range: tuple[float, float] | None = None,
        columns: int | None = None,
        name: str = "attention_maps",
        **kwargs,
    ):
        super().__init__()
        self.log_dir = str(log_dir)
        self.images = np.asarray(images)
        self.layer = layer
        self.tokens = tokens
        self.every = check_positive_int("every", every)
        self.value_range = value_range
        self.columns = columns
        self.name = name
        self.overlay_arguments = kwargs
        self._maps_model = None
        self._writer = None

    def on_train_begin(self, logs=None):
        import tensorflow as tf

        self._maps_model = attention_model(self.model, self.layer)
        self._writer = tf.summary.create_file_writer(self.log_dir)

    def on_epoch_end(self, epoch, logs=None):
        import tensorflow as tf

        if (epoch + 1) % self.every:
            return
        maps = self._maps_model.predict(self.images, verbose=0)
        pictures = attention_grid(
            self.images,
            maps,
            self.tokens,
            self.value_range,
            self.columns,
            **self.overlay_arguments,
        )
        statistics = token_statistics(maps)
        others = statistics.overlap * (1 - np.eye(len(statistics.overlap)))
        numbers = {
            f"{self.name}_entropy": float(statistics.entropy.mean()),
            f"{self.name}_entropy_max": float(statistics.entropy.max()),
            f"{self.name}_overlap_max": float(others.max()),
        }
        if logs is not None:
            logs.update(numbers)
        with self._writer.as_default():
            tf.summary.image(self.name, pictures, step=epoch, max_outputs=len(pictures))
            for name, value in numbers.items():
                tf.summary.scalar(name, value, step=epoch)
        self._writer.flush()

    def on_train_end(self, logs=None):
        self._writer.close()
