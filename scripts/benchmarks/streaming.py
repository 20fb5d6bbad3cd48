"""One sample after the other, batch 1, without gradients: microseconds per step at the sizes of psMNIST."""

import statistics
import sys

from cases import PSMNIST
from contender import in_turn


def run(*, runs: int, keras: str | None, **_) -> dict:
    """Times steps with and without feedback, compiled and in Python, beside torch's cells, in microseconds."""
    results = {}
    for kind in ("coupled", "uncoupled"):
        case = {**PSMNIST, "batch": 1, "steps": 8, "coupled": kind == "coupled"}
        contenders = [(sys.executable, name, case) for name in ("ours", "ours in Python", "nn.RNN", "nn.LSTM")]
        if keras:
            contenders.append((keras, "keras-lmu", case))
        results[kind] = in_turn(contenders, "stream", runs, check=False)
        for name, times in results[kind]["runs"].items():
            spread = f"{min(times):.1f} to {max(times):.1f}"
            print(f"{kind}: {name:14s} {statistics.median(times):8.1f} us   {spread}", flush=True)
    return results
