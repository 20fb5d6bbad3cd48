"""LMUs beside torch's layers of the same hidden cell and size: what these take, in multiples of ours.

Over short and long sequences, of one row and of many, by small and large cells; ours is compared with the naive loop in float64
at each of these sizes first.
"""

import itertools
import statistics

import torch
from worker import TorchContender, timed

PEERS = {"rnn": "nn.RNN", "lstm": "nn.LSTM", "gru": "nn.GRU"}
BATCHES, COUPLED = (1, 8, 64), (True, False)
# Hidden sizes, steps, and memories by their dimensions and order. With 512 units most matrices leave the cache of a core.
GRIDS = (
    ((10, 64, 212), (28, 200, 784), ((1, 64), (4, 16))),
    ((512,), (28, 200), ((1, 256),)),
)

# Seconds for which a shorter call is repeated.
SHORT = 0.05


def run(*, runs: int, names: list[str] | None = None, **_) -> dict:
    """Forward and backward passes in turn, by cell: list of sizes, ms of ours and of torch's layer, and their ratio."""
    results: dict[str, list[dict]] = {}
    for cell in names or PEERS:
        found = []
        for hidden, steps, (dims, order), batch, coupled in itertools.chain.from_iterable(
            itertools.product(*grid, BATCHES, COUPLED) for grid in GRIDS
        ):
            sizes = {
                "hidden_size": hidden,
                "steps": steps,
                "batch": batch,
                "memory_d": dims,
                "order": order,
                "coupled": coupled,
            }
            found.append(
                {**sizes, **_compared({**sizes, "input_size": 1, "theta": steps, "hidden": cell}, PEERS[cell], runs)}
            )
        results[cell] = found
        for sizes, lengths, _ in GRIDS:
            for steps in lengths:
                ratios = [one["ratio"] for one in found if one["steps"] == steps and one["hidden_size"] in sizes]
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                print(
                    f"{PEERS[cell]:8s} {sizes} units, T {steps:3d}: {statistics.median(ratios):.2f} of ours   {spread}",
                    flush=True,
                )
    return results


def _compared(case: dict, peer: str, runs: int) -> dict:
    torch.manual_seed(0)
    contenders = {name: TorchContender(name, case) for name in ("ours", peer)}
    error = contenders["ours"].check()
    if not error < 1e-3:
        raise RuntimeError(f"not equal to the naive loop: relative error {error:.1e} at {case}")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(-(-runs // 2)):
        for name, contender in contenders.items():
            times[name].append(round(timed(contender.run, SHORT), 4))
    ours, theirs = (statistics.median(of) for of in times.values())
    return {"error": error, "ms": times, "ratio": round(theirs / ours, 3)}
