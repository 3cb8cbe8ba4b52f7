from tokenlearner_keras.evaluation.mean_average_precision import MeanAveragePrecision
from tokenlearner_keras.evaluation.merge_clips import merge_clips
from tokenlearner_keras.evaluation.per_class import PerClassReport, per_class_report

__all__ = [
    "MeanAveragePrecision",
    "PerClassReport",
    "merge_clips",
    "per_class_report",
]
