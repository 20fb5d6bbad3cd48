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


def test_only_what_there_are_numbers_for(tmp_path):
    assert plots.draw({}, tmp_path) == []
    assert plots.draw({"history": HISTORY[:1]}, tmp_path) == []
    many = {"labels": [str(i) for i in range(31)], "test": np.eye(31, dtype=int).tolist()}
    assert plots.draw({"history": HISTORY, "confusion": many}, tmp_path) == [plots.LEARNING_CURVE]
    assert [path.name for path in tmp_path.iterdir()] == [plots.LEARNING_CURVE]
