"""Measures what this package claims of its speed, and draws it.

    python scripts/benchmarks/run.py [PART ...] [--keras PYTHON] [--runs 7] [--cases NAME ...]

Parts are speed (beside keras-lmu, if given the Python of an environment with keras-lmu==0.9.0 and tensorflow-cpu, and torch's
RNN, LSTM and GRU), cells (many sizes beside the latter), scaling, choices, streaming, footprint and loading; all by default,
some 40 minutes on two cores. Each writes results/PART.json, with every run; then the pictures are drawn and README's table is
made from these files.
"""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

from lmu_hf.record import as_text, hardware, versions

RESULTS = Path(__file__).with_name("results")
PARTS = ("loading", "speed", "cells", "streaming", "scaling", "choices", "footprint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all by default")
    parser.add_argument("--keras", metavar="PYTHON", help="Python of an environment with keras-lmu")
    parser.add_argument("--runs", type=int, default=7, help="of each contender, in turn")
    parser.add_argument(
        "--cases", nargs="+", metavar="NAME", help="only some cases of speed, cells, scaling, choices or footprint"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON files and pictures")
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts or PARTS:
        print(f"== {part}", flush=True)
        started = time.monotonic()
        measure = importlib.import_module(part).run
        results = measure(runs=arguments.runs, keras=arguments.keras, names=arguments.cases)
        path = arguments.output / f"{part}.json"
        if arguments.cases and path.exists():
            results = {**json.loads(path.read_text(encoding="utf-8"))["results"], **results}
        record = {
            "hardware": hardware(),
            "versions": versions(),
            "seconds": round(time.monotonic() - started),
            "results": results,
        }
        path.write_text(as_text(record), encoding="utf-8")
    from pictures import draw

    draw(arguments.output)


if __name__ == "__main__":
    sys.exit(main())
