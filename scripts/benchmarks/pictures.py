"""The pictures of the benchmarks, from their JSON files: speed.png, scaling.png, footprint.png.

Colours are those of Okabe and Ito (2008), told apart with any colour vision; lines differ in their markers too.
"""

import json
import statistics
from pathlib import Path

STYLES = {
    "ours": ("#0072B2", "o", "LMU, uncoupled"),
    "ours coupled": ("#56B4E9", "s", "LMU, coupled"),
    "naive": ("#999999", "v", "naive loop, uncoupled"),
    "nn.RNN": ("#D55E00", "^", "nn.RNN"),
    "nn.LSTM": ("#CC79A7", "D", "nn.LSTM"),
    "nn.GRU": ("#009E73", "P", "nn.GRU"),
    "keras-lmu": ("#000000", "X", "keras-lmu"),
    "keras-lmu XLA": ("#595959", "*", "keras-lmu, XLA"),
}
AXES = {"steps": "time steps T", "order": "order N", "memory_d": "memory dimensions D", "batch": "rows B"}


def draw(folder: Path) -> None:
    """Draws what there is a file for."""
    import matplotlib

    matplotlib.use("Agg")
    for name, function in (("scaling", _scaling), ("speed", _speed)):
        path = folder / f"{name}.json"
        if path.exists():
            figure = function(json.loads(path.read_text(encoding="utf-8")))
            figure.savefig(folder / f"{name}.png", dpi=110)


def _scaling(record: dict):
    from matplotlib import pyplot
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

    figure, panels = pyplot.subplots(1, len(record["results"]), figsize=(13, 3.9), squeeze=False, layout="constrained")
    for panel, (sweep, sizes) in zip(panels[0], record["results"].items(), strict=True):
        for name in dict.fromkeys(name for own in sizes.values() for name in own):
            colour, marker, label = STYLES[name]
            found = [(int(size), own[name]) for size, own in sizes.items() if name in own]
            x, runs = [size for size, _ in found], [own for _, own in found]
            medians = [statistics.median(own) for own in runs]
            panel.plot(x, medians, color=colour, marker=marker, markersize=4.5, linewidth=1.4, label=label)
            panel.fill_between(
                x, [min(own) for own in runs], [max(own) for own in runs], color=colour, alpha=0.15, linewidth=0
            )
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_locator(FixedLocator([int(size) for size in sizes]))
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(AXES[sweep])
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("forward and backward (ms)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def _speed(record: dict):
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    results = record["results"]
    figure, axis = pyplot.subplots(figsize=(9, 0.62 * len(results) + 1.4), layout="constrained")
    seen = {}
    for row, result in enumerate(results.values()):
        ours = statistics.median(result["runs"]["ours"])
        for name, runs in result["runs"].items():
            colour, marker, label = STYLES[name]
            label = {"ours": "ours", "naive": "naive loop"}.get(name, label)
            ratios = [own / ours for own in runs]
            axis.plot([min(ratios), max(ratios)], [row, row], color=colour, linewidth=1, alpha=0.6)
            (seen[label],) = axis.plot(
                statistics.median(ratios), row, color=colour, marker=marker, markersize=7, linestyle=""
            )
    axis.axvline(1, color=STYLES["ours"][0], linewidth=0.8, alpha=0.5)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_yticks(range(len(results)), [result["title"] for result in results.values()], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("time of a training step, in multiples of ours (line: least to most)")
    axis.grid(axis="x", alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(seen.values(), seen, loc="outside lower center", ncols=7, frameon=False, fontsize=8)
    return figure
