from tokenlearner_keras.evaluation.evaluate_videos import (
    VideoScores,
    evaluate_videos,
    score_videos,
)
from tokenlearner_keras.evaluation.few_shot import (
    FEW_SHOT_DATASETS,
    FewShotReport,
    few_shot,
)
from tokenlearner_keras.evaluation.mean_average_precision import MeanAveragePrecision
from tokenlearner_keras.evaluation.merge_clips import merge_clips
from tokenlearner_keras.evaluation.per_class import PerClassReport, per_class_report

__all__ = [
    "FEW_SHOT_DATASETS",
    "FewShotReport",
    "MeanAveragePrecision",
    "PerClassReport",
    "VideoScores",
    "evaluate_videos",
    "few_shot",
    "merge_clips",
    "per_class_report",
    "score_videos",
]
