"""LMUs beside their peers: forward and backward, float32, after equality with the naive loop in float64."""

import statistics
import sys

from cases import CASES
from contender import in_turn

# keras-lmu's own loops, at several hundred steps, take XLA minutes to compile.
LONGEST_FOR_XLA = 28


def run(*, runs: int, keras: str | None, names: list[str] | None = None, **_) -> dict:
    """Times all contenders of all cases, in ms."""
    results = {}
    for name in names or CASES:
        case = CASES[name]
        contenders = [(sys.executable, one, case) for one in ("ours", "naive", *case["peers"])]
        if keras:
            contenders.append((keras, "keras-lmu", case))
            if "hidden" not in case or case["steps"] <= LONGEST_FOR_XLA:
                contenders.append((keras, "keras-lmu XLA", case))
        results[name] = {"title": case["title"], **in_turn(contenders, "run", runs)}
        print(describe_one(results[name]), flush=True)
    return results


def describe_one(result: dict) -> str:
    lines = [f"{result['title']}   (error against float64 {result['error']:.0e})"]
    ours = statistics.median(result["runs"]["ours"])
    for name, runs in result["runs"].items():
        median = statistics.median(runs)
        spread = f"{min(runs):.1f} to {max(runs):.1f}"
        lines.append(f"  {name:14s} {median:9.2f} ms   {spread:20s} {median / ours:7.2f}x ours")
    return "\n".join(lines)
