"""The tables of results and of speed in README.md, and the learning curves below them, made from the committed records.

scripts/results_table.py            # writes them
scripts/results_table.py --check    # fails if they are not what the records say
scripts/results_table.py --of runs/*/result.json    # mean and standard deviation of these
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "scripts" / "benchmarks" / "results"
BEGIN, END = "<!-- {}: made by scripts/results_table.py -->", "<!-- end of {} -->"
HEAD = (
    "| task | model | parameters | measure | test part, per seed | mean ± sd | published | run it |",
    "|---|---|---|---|---|---|---|---|",
)


def measure(record):
    """Name of the score that counts, and its value in per cent."""
    scores = record["scores"]["test"]
    name = "accuracy" if "accuracy" in scores else "nrmse"
    return name, 100 * scores[name]


def summary(values):
    """Mean and, of more than one value, sample standard deviation."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def table(records, published):
    """The rows of those configurations that have a record; ``records``: name of the file -> its content."""
    if unknown := sorted({record["name"] for record in records.values()} - set(published)):
        raise SystemExit(f"results_table: {unknown[0]} has records but no row in model_cards/published.yaml; add one")
    lines = list(HEAD)
    for name, row in published.items():
        found = sorted(
            ((record["experiment"]["seed"], file, record) for file, record in records.items() if record["name"] == name),
            key=lambda entry: entry[:2],
        )
        if not found:
            continue
        values = [measure(record)[1] for _, _, record in found]
        cells = ", ".join(f"[{value:.2f}](model_cards/{file})" for value, (_, file, _) in zip(values, found, strict=True))
        label = {"accuracy": "accuracy, %", "nrmse": "NRMSE, %"}[measure(found[0][2])[0]]
        before = f"{row['published']:g} ({row['source']})" if "published" in row else ""
        parameters = f"{found[0][2]['parameters']['total']:,}"
        run = f"`scripts/reproduce {name}`"
        lines.append(
            f"| {row['task']} | {row['model']} | {parameters} | {label} | {cells} | {summary(values)} | {before} | {run} |"
        )
    return "\n".join(lines)


def learning_curves(records, published, prefix):
    """Errors on the validation part after each epoch, for each seed of those experiments whose name begins so."""
    return {
        f"{row['model']} ({found[0]['parameters']['total'] / 1000:.0f}k)": [
            [1 - epoch["accuracy"] for epoch in record["history"]] for record in found
        ]
        for name, row in published.items()
        if name.startswith(prefix) and (found := [record for record in records.values() if record["name"] == name])
    }


def runs_of(result):
    """The runs of each contender: under "runs" or "ms", or the result itself."""
    return result.get("runs") or result.get("ms") or result


def measured(part):
    """The results of a part of the benchmarks, with the median of each contender."""
    content = json.loads((BENCHMARKS / f"{part}.json").read_text(encoding="utf-8"))["results"]
    return {
        name: (result.get("title", name), {who: statistics.median(runs) for who, runs in runs_of(result).items()})
        for name, result in content.items()
    }


def rows(head, found, contenders, cell):
    """A table with a row per case and a column per contender; ``cell``: (its median, that of ours, its name) -> text."""
    lines = [f"| {head} | " + " | ".join(contenders.values()) + " |", "|---" * (1 + len(contenders)) + "|"]
    for title, medians in found:
        cells = [cell(medians[who], medians["ours"], who) if who in medians else "" for who in contenders]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def speed():
    """Up to five tables, of the parts that were measured: time of training steps, beside torch's layers at many sizes, and on a
    GPU; of single steps; memory."""
    peers = {"nn.RNN": "nn.RNN", "nn.LSTM": "nn.LSTM", "nn.GRU": "nn.GRU"}
    keras = {"keras-lmu": "keras-lmu 0.9.0", "keras-lmu XLA": "the same, XLA"}
    cells = {"ours": "ours", "ours in Python": "ours without a compiler", "nn.RNN": "nn.RNNCell", "nn.LSTM": "nn.LSTMCell"}
    parts = ("speed", "gpu", "streaming", "footprint")
    found = {part: measured(part) for part in parts if (BENCHMARKS / f"{part}.json").exists()}
    tables = []
    if "speed" in found:
        named = found["speed"].values()
        tables.append(
            rows("forward and backward", named, {"ours": "ours, ms", "naive": "naive loop", **peers, **keras}, factor)
        )
    if (BENCHMARKS / "cells.json").exists():
        tables.append(by_cell(json.loads((BENCHMARKS / "cells.json").read_text(encoding="utf-8"))["results"]))
    if "gpu" in found:
        device = json.loads((BENCHMARKS / "gpu.json").read_text(encoding="utf-8"))["device"]
        graphs = {"ours, graph": "ours, CUDA graph", "nn.RNN, graph": "nn.RNN, CUDA graph"}
        given = {who: name for who, name in graphs.items() if all(who in medians for _, medians in found["gpu"].values())}
        columns = {"ours": "ours, ms", "naive": "naive loop", **peers, **given}
        tables.append(rows(f"forward and backward, {device}", found["gpu"].values(), columns, factor))
    if "streaming" in found:
        named = [(f"{name}, order 256, tanh 212", medians) for name, (_, medians) in found["streaming"].items()]
        tables.append(rows("one step, batch 1, µs", named, {**cells, "keras-lmu": keras["keras-lmu"]}, whole))
    if "footprint" in found:
        named = []
        for name, (_, medians) in found["footprint"].items():
            kind, _, steps = name.rpartition("-")
            named.append((f"{kind}, T {int(steps):,}", medians))
        ours = {"ours": "ours", "ours in segments": "ours, `checkpoint_steps`", "naive": "naive loop"}
        tables.append(rows("training step, batch 32, MiB", named, {**ours, "nn.RNN": "nn.RNN", "nn.LSTM": "nn.LSTM"}, whole))
    return "\n\n".join(tables)


def by_cell(found):
    """A table of what torch's layers take in multiples of ours: medians over sizes, and from where to where they go."""
    lengths = sorted({one["steps"] for sizes in found.values() for one in sizes})
    lines = ["| hidden cell | " + " | ".join(f"T {steps}" for steps in lengths) + " |"]
    lines.append("|---" * (1 + len(lengths)) + "|")
    for units, wide in (("10 to 212 units", False), ("512 units", True)):
        for cell, sizes in found.items():
            ratios = [
                [one["ratio"] for one in sizes if one["steps"] == steps and (one["hidden_size"] >= 512) == wide]
                for steps in lengths
            ]
            cells = [f"{statistics.median(of):.2f}x ({min(of):.2f} to {max(of):.2f})" if of else "" for of in ratios]
            lines.append(f"| LMU with {cell.upper()} beside nn.{cell.upper()}, {units} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def factor(value, ours, who):
    """Our milliseconds, and those of others in multiples of ours."""
    return (f"{value:.0f}" if value >= 100 else f"{value:.3g}") if who == "ours" else f"{value / ours:.2f}x"


def whole(value, ours, who):
    """A number that is the same whoever it is of."""
    return f"{value:.0f}"


def filled(text, name, content):
    """The text with the part between the marks of this name replaced."""
    begin, end = BEGIN.format(name), END.format(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"results_table: expected one {begin!r} and one {end!r} in README.md")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the table is out of date")
    parser.add_argument(
        "--of", nargs="+", type=Path, metavar="RESULT", help="records to sum up, rather than the committed ones"
    )
    arguments = parser.parse_args()
    if arguments.of:
        by_name = {}
        for path in arguments.of:
            record = json.loads(path.read_text(encoding="utf-8"))
            by_name.setdefault((record["name"], measure(record)[0]), []).append(measure(record)[1])
        for (name, label), values in by_name.items():
            each = ", ".join(f"{value:.2f}" for value in values)
            print(f"{name}: test {label} {summary(values)} % (mean ± sd of {len(values)} seeds: {each})")
        return
    published = yaml.safe_load((ROOT / "model_cards" / "published.yaml").read_text(encoding="utf-8"))
    files = sorted((ROOT / "model_cards").glob("*.json"))
    records = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in files}
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    made = filled(filled(text, "results", table(records, published)), "speed", speed())
    if arguments.check:
        if made != text:
            raise SystemExit("results_table: a table in README.md is not what the records say; run scripts/results_table.py")
        return
    readme.write_text(made, encoding="utf-8")
    from lmu_hf import plots  # a check needs no matplotlib

    plots.learning_curves(learning_curves(records, published, "psmnist-"), ROOT / "model_cards" / "psmnist" / "errors.png")


if __name__ == "__main__":
    sys.exit(main())
