"""The pictures: all numbers that there are, named with their units, and readable at every size."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lmu_hf import plots

HISTORY = [{"epoch": float(e), "train_loss": 2 / e, "loss": 2.1 / e, "accuracy": 1 - 0.5 / e} for e in range(1, 6)]


@pytest.fixture
def figures(monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), save(self, *args, **kwargs))[1]
    )
    return drawn


def test_learning_curve(tmp_path, figures):
    plots.learning_curve(HISTORY, tmp_path / "curve.png", best_epoch=4)
    loss, accuracy = figures[0].axes
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("cross-entropy (nats)", "validation accuracy (%)")
    assert loss.get_xlabel() == accuracy.get_xlabel() == "epoch"
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "validation", "kept: epoch 4"]
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [100 * entry["accuracy"] for entry in HISTORY])
    # Told apart without colour, too.
    assert loss.lines[0].get_linestyle() != loss.lines[1].get_linestyle()
    with Image.open(tmp_path / "curve.png") as image:
        assert image.width > 800


def test_learning_curve_of_a_loss_alone(tmp_path, figures):
    plots.learning_curve([{"epoch": 1.0, "loss": 3.0}, {"epoch": 2.0, "train_loss": 0.0}], tmp_path / "curve.svg")
    (loss,) = figures[0].axes
    assert loss.get_ylabel() == "loss"
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("labels", [["no", "yes"], [f"class number {i}" for i in range(30)]])
def test_confusion_matrix(tmp_path, figures, labels):
    confusion = np.diag(np.arange(1, len(labels) + 1))
    confusion[0, 1] = 3
    plots.confusion_matrix(confusion.tolist(), labels, tmp_path / "matrix.png")
    axis, bar = figures[0].axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")
    assert bar.get_ylabel() == "share of the true class (%)"
    assert [tick.get_text() for tick in axis.get_yticklabels()] == labels
    counts = {(round(text.get_position()[1]), round(text.get_position()[0])): int(text.get_text()) for text in axis.texts}
    assert counts == {(row, column): count for (row, column), count in np.ndenumerate(confusion) if count}
    with Image.open(tmp_path / "matrix.png") as image:
        edge = np.asarray(image.convert("L"))
    assert min(edge[0].min(), edge[-1].min(), edge[:, 0].min(), edge[:, -1].min()) == 255  # nothing is cut off


def test_learning_curve_of_values(tmp_path, figures):
    history = [
        {"epoch": float(e), "train_loss": 1 / e, "loss": 1 / e, "mse": 1 / e, "nrmse": 100.0**-e} for e in range(1, 4)
    ]
    plots.learning_curve(history, tmp_path / "curve.png")
    loss, share = figures[0].axes
    assert (loss.get_ylabel(), share.get_ylabel()) == ("loss", "validation NRMSE (%)")
    assert share.get_yscale() == "log"
    np.testing.assert_allclose(share.lines[0].get_ydata(), [100 * entry["nrmse"] for entry in history])


def test_predictions_over_time(tmp_path, figures):
    record = {"of": "steps", "labels": ["a"], "first": 100, "every": 3, "true": [[1.0], [None]], "predicted": [[1.1], [2.0]]}
    plots.predictions(record, tmp_path / "predictions.png", "volts")
    (axis,) = figures[0].axes
    assert figures[0].get_supxlabel() == "step of the first test series"
    assert figures[0].get_supylabel() == "volts"
    assert axis.get_title(loc="left") == "a"
    true, found = axis.lines
    assert true.get_linestyle() != found.get_linestyle()
    np.testing.assert_array_equal(true.get_xdata(), [100, 103])
    np.testing.assert_array_equal(true.get_ydata(), [1, np.nan])
    np.testing.assert_array_equal(found.get_ydata(), [1.1, 2.0])


def test_predictions_of_many_values_per_row(tmp_path, figures):
    names = [f"target {i}" for i in range(9)]
    rows = np.arange(27.0).reshape(3, 9)
    plots.predictions(
        {"of": "rows", "labels": names, "true": rows.tolist(), "predicted": (rows + 1).tolist()}, tmp_path / "p.png"
    )
    axes = figures[0].axes
    assert [axis.get_title(loc="left") for axis in axes] == [names[0], names[3], names[5], names[8]]
    np.testing.assert_array_equal(axes[3].lines[1].get_xdata(), rows[:, 8])
    np.testing.assert_array_equal(axes[3].lines[1].get_ydata(), rows[:, 8] + 1)
    assert figures[0].get_supxlabel() == "true value"


def test_delay_errors(tmp_path, figures):
    curves = {
        "LMU": {100: {0.5: 0.001, 1.0: 0.01}, 1000: {0.5: 0.002, 1.0: 0.02}},
        "LSTM": {100: {0.5: 0.8, 1.0: 0.9}},
    }
    plots.delay_errors(curves, tmp_path / "errors.svg")
    longest, each = figures[0].axes
    assert (longest.get_xscale(), longest.get_yscale(), each.get_yscale()) == ("log", "log", "log")
    assert longest.get_xlabel() == "delay T (steps)"
    np.testing.assert_allclose(longest.lines[0].get_xydata(), [[100, 1], [1000, 2]])
    np.testing.assert_allclose(longest.lines[1].get_xydata(), [[100, 90]])
    assert [text.get_text() for text in each.get_legend().get_texts()] == ["T = 100", "T = 1,000"]


def test_learning_curves_of_several_experiments(tmp_path, figures):
    curves = {"LMU (102k)": [[0.09, 0.05, 0.03], [0.08, 0.06, 0.04]], "LSTM (102k)": [[0.9, 0.5]]}
    plots.learning_curves(curves, tmp_path / "errors.svg")
    (axis,) = figures[0].axes
    first, second = axis.get_lines()
    assert (first.get_label(), second.get_label()) == ("LMU (102k)", "LSTM (102k)")
    np.testing.assert_allclose(first.get_ydata(), [8.5, 5.5, 3.5])
    assert list(second.get_xdata()) == [1, 2]
    assert axis.get_ylabel() == "errors on the validation part (%)"
    assert (first.get_color(), first.get_marker()) != (second.get_color(), second.get_marker())


def test_only_what_there_are_numbers_for(tmp_path):
    assert plots.draw({}, tmp_path) == []
    assert plots.draw({"history": HISTORY[:1]}, tmp_path) == []
    many = {"labels": [str(i) for i in range(31)], "test": np.eye(31, dtype=int).tolist()}
    assert plots.draw({"history": HISTORY, "confusion": many}, tmp_path) == [plots.LEARNING_CURVE]
    assert [path.name for path in tmp_path.iterdir()] == [plots.LEARNING_CURVE]
