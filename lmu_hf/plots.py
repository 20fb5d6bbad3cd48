"""Pictures of a run, made from its record: learning curve, confusion matrix, predicted beside true values; of several runs,
learning curves and errors of the delay task side by side. Needs matplotlib.

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
PREDICTIONS = "predictions.png"
MAX_CLASSES = 30  # of a confusion matrix that can still be read

_MAX_TARGETS = 4  # that are drawn of many

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#595959"
# Scores that are shares: shown in percent, under these names.
_SHARES = {"accuracy": "validation accuracy (%)", "nrmse": "validation NRMSE (%)"}


def learning_curve(
    history: Sequence[dict[str, float]], path: str | Path, best_epoch: float | None = None, *, moved: bool = False
) -> None:
    """Draws loss and, where there is one, accuracy or NRMSE over the epochs.

    Args:
        history: per epoch ``epoch`` and any of ``train_loss``, ``loss`` (validation), ``accuracy`` or ``nrmse`` (validation, as
            a share).
        path: file to write; its ending says the format.
        best_epoch: epoch whose weights were kept, marked by a line.
        moved: the loss of training is also that of rows moved against it, and so above that of validation.
    """
    share = next((name for name in _SHARES if _curve(history, name)), None)
    figure, axes = _figure(7.5 if share else 4.5, 3.0, columns=2 if share else 1)
    loss = axes[0]
    for name, label, colour, style in (
        ("train_loss", "training, with moved rows" if moved else "training", _ORANGE, "--"),
        ("loss", "validation", _BLUE, "-"),
    ):
        if curve := _curve(history, name):
            loss.plot(*curve, style, color=colour, label=label, linewidth=1.6, **_marker(curve))
    values = [entry[name] for entry in history for name in ("train_loss", "loss") if name in entry]
    if min(values) > 0 and max(values) / min(values) > 20:
        loss.set_yscale("log")
    # Accuracy is of classes, and their loss is a cross-entropy; of any other loss the unit is not known here.
    loss.set_ylabel("cross-entropy (nats)" if share == "accuracy" else "loss")
    if share is not None and (curve := _curve(history, share)):
        epochs, shares = curve
        percent = [100 * value for value in shares]
        axes[1].plot(epochs, percent, color=_BLUE, linewidth=1.6, label="validation", **_marker(curve))
        axes[1].set_ylabel(_SHARES[share])
        if share == "nrmse" and min(percent) > 0 and max(percent) / min(percent) > 20:
            axes[1].set_yscale("log")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        _lighten(axis)
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


def predictions(record: dict[str, Any], path: str | Path, unit: str | None = None) -> None:
    """Draws predicted and true values: over time, or one against the other where there is one per row.

    Args:
        record: ``of`` ("steps" or "rows"), ``labels``, ``true`` and ``predicted`` (steps or rows, targets), None where a value
            is not known; of steps also ``first`` and ``every``, which they are. At most four targets are drawn, the first and
            the last among them.
        path: file to write; its ending says the format.
        unit: of the values.
    """
    count = len(record["labels"])
    shown = sorted({round(index * (count - 1) / (_MAX_TARGETS - 1)) for index in range(_MAX_TARGETS)})
    over_time = record["of"] == "steps"
    if over_time:
        figure, axes = _figure(7.5, 1.2 + 1.6 * len(shown), rows=len(shown))
    else:
        figure, axes = _figure(3.6 * len(shown), 3.6, columns=len(shown))
    for target, axis in zip(shown, axes, strict=True):
        true = [float("nan") if row[target] is None else row[target] for row in record["true"]]
        found = [row[target] for row in record["predicted"]]
        axis.set_title(record["labels"][target], fontsize=9, loc="left")
        if over_time:
            steps = [record.get("first", 0) + index * record.get("every", 1) for index in range(len(true))]
            axis.plot(steps, true, color=_GREY, linewidth=2.8, alpha=0.6, label="true")
            axis.plot(steps, found, "--", color=_ORANGE, linewidth=1.3, label="predicted")
            axis.margins(x=0.01)
        else:
            ends = [min(*true, *found), max(*true, *found)]
            axis.plot(ends, ends, ":", color=_GREY, linewidth=1.2, label="exact")
            axis.plot(true, found, "o", color=_BLUE, markersize=3, alpha=0.6, markeredgewidth=0, label="rows")
        _lighten(axis)
    inside = f" ({unit})" if unit else ""
    figure.supxlabel("step of the first test series" if over_time else f"true value{inside}", fontsize=9)
    figure.supylabel((unit or "value") if over_time else "predicted value", fontsize=9)
    # Above the curves, which fill their axes.
    axes[0].legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
    _save(figure, path)


def delay_errors(curves: dict[str, dict[int, dict[float, float]]], path: str | Path) -> None:
    """Draws how well models say what the input was: against the longest delay, and for the first model against each delay.

    Args:
        curves: model -> longest delay T, in steps -> delay as a share of T -> NRMSE.
        path: file to write; its ending says the format.
    """
    figure, (longest, each) = _figure(8.5, 3.4, columns=2)
    styles = zip((_BLUE, _ORANGE, _GREY, "#009E73"), ("o-", "s--", "^:", "v-."), strict=True)
    for (name, by_delay), (colour, style) in zip(curves.items(), styles, strict=False):
        delays = sorted(by_delay)
        percent = [100 * by_delay[delay][max(by_delay[delay])] for delay in delays]
        longest.plot(delays, percent, style, color=colour, label=name, linewidth=1.6, markersize=5)
    name, by_delay = next(iter(curves.items()))
    shades = ("#CC79A7", "#E69F00", "#009E73", _BLUE)
    for delay, colour, style in zip(sorted(by_delay), shades, ("v-.", "^:", "s--", "o-"), strict=False):
        shares = sorted(by_delay[delay])
        percent = [100 * by_delay[delay][share] for share in shares]
        each.plot(shares, percent, style, color=colour, label=f"T = {delay:,}", linewidth=1.6, markersize=5)
    longest.set_xscale("log")
    longest.set_xlabel("delay T (steps)")
    longest.set_ylabel("NRMSE at the delay T (%)")
    longest.axhline(100, color=_GREY, linewidth=0.8, alpha=0.6)
    each.set_xlabel("delay (share of T)")
    each.set_ylabel("NRMSE (%)")
    each.set_title(name, fontsize=9)
    for axis in (longest, each):
        axis.set_yscale("log")
        _lighten(axis)
        axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def learning_curves(curves: dict[str, Sequence[Sequence[float]]], path: str | Path) -> None:
    """Draws the errors of several experiments on the validation part, epoch by epoch: means of the seeds, and their range.

    Args:
        curves: experiment -> for each seed the share of errors after each epoch. At most nine experiments.
        path: file to write; its ending says the format.
    """
    figure, (axis,) = _figure(8.5, 4.0)
    colours = (_BLUE, "#56B4E9", "#009E73", "#000000", _ORANGE, "#E69F00", "#CC79A7", _GREY, "#999999")
    longest = max(len(seed) for seeds in curves.values() for seed in seeds)
    for (name, seeds), colour, marker in zip(curves.items(), colours, "osv^DPX<>", strict=False):
        by_epoch = [[100 * error for error in epoch] for epoch in zip(*seeds, strict=True)]
        epochs = range(1, len(by_epoch) + 1)
        means = [sum(errors) / len(errors) for errors in by_epoch]
        marks = [epoch - 1 for epoch in (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50) if epoch <= len(means)]
        axis.plot(epochs, means, color=colour, marker=marker, markevery=marks, markersize=4.5, linewidth=1.4, label=name)
        low, high = [min(errors) for errors in by_epoch], [max(errors) for errors in by_epoch]
        axis.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks([epoch for epoch in (1, 2, 5, 10, 25, 50, 100) if epoch <= longest])
    axis.set_yticks([1, 2, 5, 10, 20, 50, 100])
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter(lambda value, _: f"{value:g}")
    axis.minorticks_off()
    axis.set_xlabel("epoch")
    axis.set_ylabel("errors on the validation part (%)")
    _lighten(axis)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
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
        settings = result.get("settings") or result.get("experiment", {}).get("training", {})
        moved = bool(settings.get("adversarial_radius"))
        learning_curve(result["history"], Path(folder) / LEARNING_CURVE, result.get("best_epoch"), moved=moved)
        written.append(LEARNING_CURVE)
    confusion = result.get("confusion")
    if confusion and len(confusion["labels"]) <= MAX_CLASSES:
        confusion_matrix(confusion["test"], confusion["labels"], Path(folder) / CONFUSION_MATRIX)
        written.append(CONFUSION_MATRIX)
    if "predictions" in result:
        predictions(result["predictions"], Path(folder) / PREDICTIONS, result.get("dataset", {}).get("unit"))
        written.append(PREDICTIONS)
    return written


def _figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    # A figure by itself, not one of pyplot's: no display, no global state, nothing to close.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=rows > 1).flatten()


def _lighten(axis: Any) -> None:
    """A pale grid, and no frame above and on the right."""
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


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
