"""Pictures of a run, made from its record: learning curve and confusion matrix. Needs matplotlib.

Colours are those of Okabe and Ito (2008), told apart with any colour vision; lines differ in style too, and the shades of the
matrix in lightness.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEARNING_CURVE = "learning_curve.png"
CONFUSION_MATRIX = "confusion_matrix.png"
MAX_CLASSES = 30  # of a confusion matrix that can still be read

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#595959"


def learning_curve(history: Sequence[dict[str, float]], path: str | Path, best_epoch: float | None = None) -> None:
    """Draws loss and, where there is one, accuracy over the epochs.

    Args:
        history: per epoch ``epoch`` and any of ``train_loss``, ``loss`` (validation), ``accuracy`` (validation, 0..1).
        path: file to write; its ending says the format.
        best_epoch: epoch whose weights were kept, marked by a line.
    """
    accuracy = _curve(history, "accuracy")
    figure, axes = _figure(7.5 if accuracy else 4.5, 3.0, columns=2 if accuracy else 1)
    loss = axes[0]
    for name, label, colour, style in (
        ("train_loss", "training", _ORANGE, "--"),
        ("loss", "validation", _BLUE, "-"),
    ):
        if curve := _curve(history, name):
            loss.plot(*curve, style, color=colour, label=label, linewidth=1.6, **_marker(curve))
    values = [entry[name] for entry in history for name in ("train_loss", "loss") if name in entry]
    if min(values) > 0 and max(values) / min(values) > 20:
        loss.set_yscale("log")
    # Accuracy is of classes, and their loss is a cross-entropy; of any other loss the unit is not known here.
    loss.set_ylabel("cross-entropy (nats)" if accuracy else "loss")
    if accuracy:
        epochs, shares = accuracy
        percent = [100 * share for share in shares]
        axes[1].plot(epochs, percent, color=_BLUE, linewidth=1.6, label="validation", **_marker(accuracy))
        axes[1].set_ylabel("validation accuracy (%)")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if best_epoch is not None:
            axis.axvline(best_epoch, color=_GREY, linestyle=":", linewidth=1.2, label=f"kept: epoch {best_epoch:g}")
    loss.legend(frameon=False, fontsize=8)
    _save(figure, path)


def confusion_matrix(confusion: Sequence[Sequence[int]], labels: Sequence[str], path: str | Path) -> None:
    """Draws how often each class was taken for which, in rows of the true class.

    Args:
        confusion: counts, true class by predicted class.
        labels: names of the classes.
        path: file to write; its ending says the format.
    """
    size = max(3.2, 1.6 + 0.38 * len(labels))
    figure, (axis,) = _figure(size + 0.8, size)
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for true, row in enumerate(confusion):
        for predicted, count in enumerate(row):
            if count:
                colour = "white" if shares[true][predicted] > 0.55 else "black"
                axis.text(predicted, true, f"{count}", ha="center", va="center", color=colour, fontsize=7)
    turned = max(len(label) for label in labels) > 3
    axis.set_xticks(range(len(labels)), labels, rotation=45 if turned else 0, ha="right" if turned else "center", fontsize=8)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    bar = figure.colorbar(image, ax=axis, fraction=0.046, pad=0.04, format=lambda share, _: f"{100 * share:g}")
    bar.set_label("share of the true class (%)", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    _save(figure, path)


def draw(result: dict[str, Any], folder: str | Path) -> list[str]:
    """Draws every picture that a record has the numbers for.

    Args:
        result: content of a ``result.json``.
        folder: where to put them.

    Returns:
        Names of the files written.
    """
    written = []
    if len(result.get("history", ())) > 1:
        learning_curve(result["history"], Path(folder) / LEARNING_CURVE, result.get("best_epoch"))
        written.append(LEARNING_CURVE)
    confusion = result.get("confusion")
    if confusion and len(confusion["labels"]) <= MAX_CLASSES:
        confusion_matrix(confusion["test"], confusion["labels"], Path(folder) / CONFUSION_MATRIX)
        written.append(CONFUSION_MATRIX)
    return written


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    # A figure by itself, not one of pyplot's: no display, no global state, nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _save(figure: Figure, path: str | Path) -> None:
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.08)


def _curve(history: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]] | None:
    points = [(entry["epoch"], entry[name]) for entry in history if name in entry]
    if not points:
        return None
    epochs, values = zip(*points, strict=True)
    return list(epochs), list(values)


def _marker(curve: tuple[list[float], list[float]]) -> dict[str, Any]:
    """Marks the points of a curve that has few."""
    return {"marker": "o", "markersize": 3} if len(curve[0]) <= 15 else {}
