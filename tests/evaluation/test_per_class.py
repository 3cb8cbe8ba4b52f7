import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from tokenlearner_keras.evaluation import MeanAveragePrecision, per_class_report


def make_data():
    rng = np.random.default_rng(0)
    labels = (rng.random((50, 4)) < 0.3).astype(int)
    labels[:, 2] = 0
    return labels, rng.random((50, 4)) + 0.3 * labels


def test_values_and_means():
    labels, scores = make_data()
    report = per_class_report(labels, scores, ["sit", "stand", "never", "run"])
    expected = average_precision_score(
        labels[:, [0, 1, 3]], scores[:, [0, 1, 3]], average=None
    )
    np.testing.assert_allclose(
        report.average_precision[[0, 1, 3]], expected, atol=1e-12
    )
    assert np.isnan(report.average_precision[2])
    assert report.num_positives.tolist() == labels.sum(axis=0).tolist()
    assert report.mean() == pytest.approx(expected.mean())
    assert report.mean("zero") == pytest.approx(expected.sum() / 4)
    assert np.isnan(report.mean("nan"))
    metric = MeanAveragePrecision(4, 50)
    metric.update_state(labels, scores)
    assert report.mean() == pytest.approx(float(metric.result()), abs=1e-6)


def test_table_has_the_worst_class_first():
    labels, scores = make_data()
    report = per_class_report(labels, scores, ["sit", "stand", "never", "run"])
    lines = str(report).splitlines()
    assert lines[0].split() == ["class", "positives", "AP"]
    shown = [float(line.split()[2]) for line in lines[1:4]]
    assert shown == sorted(shown)
    assert lines[4].split() == ["never", "0", "-"]
    assert lines[5] == (
        f"mAP {report.mean():.4f} over 3 classes and 50 examples; "
        "left out: 1 without positives"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros((3, 2))}, r"Received: \(3, 2\) and \(3, 4\)"),
        ({"labels": np.full((3, 4), 2)}, "must hold zeros and ones"),
        ({"scores": np.full((3, 4), np.nan)}, "Received: 12 nan of 12"),
        ({"class_names": ["a"]}, "Received: 1 names for 4 classes"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"labels": np.eye(3, 4), "scores": np.zeros((3, 4)), **change}
    with pytest.raises(ValueError, match=message):
        per_class_report(**arguments)
