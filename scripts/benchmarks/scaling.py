"""How the time of a training step grows with the length, the order, the memory dimensions and the batch; forward and backward."""

import statistics
import sys

from cases import SCALING, SWEEPS
from contender import in_turn

# The naive loop is left out where it would take minutes.
LONGEST_NAIVE = 4096


def run(*, runs: int, names: list[str] | None = None, **_) -> dict:
    """Times each size of each sweep, in ms: sweep -> size -> contender -> runs."""
    results: dict = {}
    for sweep in names or SWEEPS:
        results[sweep] = {}
        for size in SWEEPS[sweep]:
            case = {**SCALING, sweep: size}
            if sweep == "memory_d":
                case["input_size"] = size
            contenders = [(sys.executable, "ours", case), (sys.executable, "ours coupled", {**case, "coupled": True})]
            if case["steps"] <= LONGEST_NAIVE:
                contenders.append((sys.executable, "naive", case))
            contenders += [(sys.executable, "nn.RNN", case), (sys.executable, "nn.LSTM", case)]
            own = in_turn(contenders, "run", runs, check=case["steps"] <= LONGEST_NAIVE)["runs"]
            results[sweep][str(size)] = own
            medians = "   ".join(f"{name} {statistics.median(times):.2f}" for name, times in own.items())
            print(f"{sweep} {size}: {medians} ms", flush=True)
    return results
