from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tokenlearner_keras.layers._checks import check_choice

EMPTY_CLASS_POLICIES = ("ignore", "zero", "nan")


@dataclass(frozen=True)
class PerClassReport:
    """Average precision of each class; `str(report)` is a table, worst class first.

    Attributes:
        class_names: Names, in the order of the classes.
        num_positives: Positive examples of each class.
        average_precision: Average precision of each class, `nan` without positives.
        num_examples: Number of examples.
    """

    class_names: tuple[str, ...]
    num_positives: np.ndarray
    average_precision: np.ndarray
    num_examples: int

    def mean(self, without_positives: str = "ignore") -> float:
        """The mean average precision, by a policy of `MeanAveragePrecision`."""
        check_choice("without_positives", without_positives, EMPTY_CLASS_POLICIES)
        values = self.average_precision
        if without_positives == "zero":
            values = np.nan_to_num(values, nan=0.0)
        elif without_positives == "ignore":
            values = values[~np.isnan(values)]
        return float(np.mean(values)) if len(values) else float("nan")

    def __str__(self):
        width = max(len("class"), *(len(name) for name in self.class_names))
        lines = [f"{'class':{width}}  positives      AP"]
        for index in np.argsort(self.average_precision, kind="stable"):
            value = self.average_precision[index]
            shown = "-" if np.isnan(value) else f"{value:.4f}"
            lines.append(
                f"{self.class_names[index]:{width}}  "
                f"{self.num_positives[index]:9d}  {shown:>6}"
            )
        without = int(np.isnan(self.average_precision).sum())
        lines.append(
            f"mAP {self.mean():.4f} over {len(self.class_names) - without} classes and "
            f"{self.num_examples} examples; left out: {without} without positives"
        )
        return "\n".join(lines)


def per_class_report(
    labels, scores, class_names: Sequence[str] | None = None
) -> PerClassReport:
    """Reports the average precision of every class, by scikit-learn.

    Args:
        labels: Array of shape `(examples, classes)` of zeros and ones.
        scores: Array of shape `(examples, classes)`; higher means more likely.
        class_names: Names of the classes. `None` takes their numbers.

    Returns:
        A `PerClassReport`.

    Raises:
        ValueError: if the shapes do not fit, labels are not zeros and ones, or a score
            is not a number.
    """
    from sklearn.metrics import average_precision_score

    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 2 or labels.shape != scores.shape or 0 in labels.shape:
        raise ValueError(
            "Arguments `labels` and `scores` must have one shape (examples, classes). "
            f"Received: {labels.shape} and {scores.shape}"
        )
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(
            "Argument `labels` must hold zeros and ones. "
            f"Received: values from {labels.min()} to {labels.max()}"
        )
    if np.isnan(scores).any():
        raise ValueError(
            "Argument `scores` must be numbers. "
            f"Received: {int(np.isnan(scores).sum())} nan of {scores.size}"
        )
    num_classes = labels.shape[1]
    names = tuple(map(str, range(num_classes) if class_names is None else class_names))
    if len(names) != num_classes:
        raise ValueError(
            "Argument `class_names` must have one name a class. "
            f"Received: {len(names)} names for {num_classes} classes"
        )
    num_positives = labels.sum(axis=0).astype(int)
    values = np.full(num_classes, np.nan)
    for index in np.flatnonzero(num_positives):
        values[index] = average_precision_score(labels[:, index], scores[:, index])
    return PerClassReport(names, num_positives, values, len(labels))
