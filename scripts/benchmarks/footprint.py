"""What a training step holds in memory beyond weights and data: MiB at its peak, each in a fresh process."""

import statistics
import sys

from cases import FOOTPRINTS
from contender import Contender

# Of the longest sequences only what is meant for them is run.
LONGEST_NAIVE = 4096


def run(*, keras: str | None, names: list[str] | None = None, **_) -> dict:
    """Measures each contender, the shorter cases twice, in MiB: case -> contender -> all."""
    results: dict = {}
    for name in names or FOOTPRINTS:
        case = FOOTPRINTS[name]
        contenders = [(sys.executable, one) for one in ("ours", *case["peers"])]
        if case["steps"] <= LONGEST_NAIVE:
            contenders.append((sys.executable, "naive"))
        if "segments" in case:
            contenders.append((sys.executable, "ours in segments"))
        results[name] = {}
        for python, one in contenders:
            found = []
            for _ in range(2 if case["steps"] <= LONGEST_NAIVE and one != "naive" else 1):
                with Contender(python, one, case) as contender:
                    found.append(round(contender.ask("memory"), 1))
            results[name][one] = found
            print(f"{name}: {one:16s} {statistics.mean(found):9.1f} MiB", flush=True)
    return results
