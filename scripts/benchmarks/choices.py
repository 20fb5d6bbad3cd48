"""Whether "auto" chooses well: every algorithm and chunk at a grid of sizes, interleaved, and what the choice of "auto" costs.

For each size: the time of what "auto" takes, divided by the shortest of all. 1.00 is the best there is.
"""

import itertools
import statistics
from unittest import mock

import torch
from worker import timed

from lmu_hf import LMU
from lmu_hf.model import plan as planning
from lmu_hf.model.costs import CHUNKS
from lmu_hf.model.memory import linear_memory

# Rows, steps, order of memories; the longest with many rows are left out, as they take minutes and say nothing new.
MEMORIES = [
    sizes
    for sizes in itertools.product((1, 8, 64, 512), (16, 128, 1024, 8192), (4, 8, 32, 128, 256))
    if sizes[0] * sizes[1] * sizes[2] <= 1 << 23
]
# Batch, steps, memory dimensions, order, hidden units of layers with a recurrent cell, and the cell.
LAYERS = [
    (1, 784, 1, 256, 212, "rnn"),
    (32, 784, 1, 256, 212, "rnn"),
    (100, 784, 1, 256, 212, "rnn"),
    (16, 512, 1, 64, 128, "rnn"),
    (16, 512, 16, 16, 128, "rnn"),
    (32, 256, 64, 8, 64, "rnn"),
    (64, 28, 10, 3, 16, "rnn"),
    (1, 400, 4, 16, 64, "rnn"),
    (16, 400, 1, 16, 128, "rnn"),
    (100, 400, 10, 3, 128, "rnn"),
    (100, 28, 16, 8, 32, "rnn"),
    (2, 256, 8, 8, 128, "rnn"),
    (8, 64, 1, 128, 128, "rnn"),
    (1, 128, 1, 32, 256, "rnn"),
    (2, 64, 1, 32, 64, "lstm"),
    (32, 128, 2, 64, 64, "lstm"),
    (2, 128, 1, 64, 64, "gru"),
    (16, 256, 4, 16, 32, "gru"),
]

# Seconds for which a shorter call is repeated, so that it is not its threads' waking up that is compared.
SHORT = 0.02


def run(*, runs: int, names: list[str] | None = None, **_) -> dict:
    """Walks both grids, forward and with backward: list of sizes, ms of each way, the choice and what it costs."""
    torch.manual_seed(0)
    report: dict[str, list] = {name: [] for name in names or ("memories", "layers")}
    for training in (False, True):
        for rows, steps, order in MEMORIES if "memories" in report else ():
            _report(report["memories"], _memory(rows, steps, order, training, runs))
        for sizes in LAYERS if "layers" in report else ():
            for coupled in (False, True):
                _report(report["layers"], _layer(*sizes, coupled, training, runs))
    for name, found in report.items():
        costs = [one["cost"] for one in found]
        worse = sum(cost > 1.15 for cost in costs)
        print(f"{name}: {len(costs)} sizes, mean {statistics.mean(costs):.3f}, worst {max(costs):.2f}, {worse} above 1.15")
    return report


def _memory(rows: int, steps: int, order: int, training: bool, runs: int) -> dict:
    layer = LMU(1, 1, order, 2.0 * steps, return_sequences=True, kernel_initializer=None)
    system = layer.cell.system()
    u = torch.randn(rows, steps, 1, requires_grad=training)
    chosen = layer.explain(rows, steps, training=training)

    def call(algorithm, chunk):
        with torch.set_grad_enabled(training), mock.patch("lmu_hf.model.memory.memory_chunk", return_value=chunk):
            states, _ = linear_memory(u, system, algorithm=algorithm)
        if training:
            states.backward(torch.ones_like(states))

    ways = [("fft", 0), *(("chunked", size) for size in CHUNKS[2:] if size <= max(steps, 4))]
    if order <= 32:
        ways.append(("scan", 0))
    sizes = {"rows": rows, "steps": steps, "order": order, "training": training}
    return {**sizes, **_compared(ways, call, (chosen.memory, chosen.chunk), runs)}


def _layer(
    batch: int, steps: int, dims: int, order: int, hidden: int, cell: str, coupled: bool, training: bool, runs: int
) -> dict:
    feedback = {"hidden_to_memory": coupled, "memory_to_memory": coupled, "input_to_hidden": True}
    layer = LMU(dims, dims, order, 1.0 * steps, cell, hidden, return_sequences=True, **feedback)
    x = torch.randn(batch, steps, dims)
    chosen = layer.explain(batch, steps, training=training)

    def call(memory, chunk):
        choice = mock.patch.object(planning, "recurrence_algorithm", return_value=(memory, chunk))
        with torch.set_grad_enabled(training), choice:
            output = layer(x)
        if training:
            output.backward(torch.ones_like(output))

    if coupled:
        ways = [("lookahead", size) for size in CHUNKS[:7] if size <= steps]
    else:
        ways = [(memory, size) for memory in ("folded", "written") for size in (8, 16, 32, 64) if size <= max(steps, 8)]
        ways.append(("convolved", 0))
    ways.append(("merged", 0))
    sizes = {"batch": batch, "steps": steps, "memory_d": dims, "order": order, "cell": cell, "hidden": hidden}
    return {**sizes, "coupled": coupled, "training": training, **_compared(ways, call, (chosen.memory, chosen.chunk), runs)}


def _compared(ways: list[tuple[str, int]], call, chosen: tuple[str, int], runs: int) -> dict:
    """Median ms of each way, and what the chosen one takes in shares of the shortest."""
    if chosen not in ways:
        ways.append(chosen)
    for way in ways:
        call(*way)
    times: dict = {way: [] for way in ways}
    for _ in range(runs):
        for way in ways:
            times[way].append(timed(lambda way=way: call(*way), SHORT))
    medians = {way: statistics.median(own) for way, own in times.items()}
    names = {f"{memory} {chunk}" if chunk else memory: round(value, 4) for (memory, chunk), value in medians.items()}
    name = f"{chosen[0]} {chosen[1]}" if chosen[1] else chosen[0]
    return {"ms": names, "chosen": name, "cost": round(medians[chosen] / min(medians.values()), 3)}


def _report(found: list, one: dict) -> None:
    found.append(one)
    if one["cost"] > 1.15:
        best = min(one["ms"], key=one["ms"].__getitem__)
        sizes = {key: value for key, value in one.items() if key not in ("ms", "chosen", "cost")}
        print(f"  {sizes}: took {one['chosen']}, {one['cost']:.2f} of {best}", flush=True)
