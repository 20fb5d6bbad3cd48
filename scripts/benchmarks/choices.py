"""Whether "auto" chooses well: every algorithm and chunk at a grid of sizes, interleaved, and what the choice of "auto" costs.

For each size: the time of what "auto" takes, divided by the shortest of all. 1.00 is the best there is. The grids are walked
several times, and medians taken over all of these, since for minutes on end a shared processor favours one way or another.
"""

import itertools
import statistics
from typing import NamedTuple
from unittest import mock

import torch
from worker import timed

from lmu_hf import LMU
from lmu_hf.model import plan as planning
from lmu_hf.model.convolution import block_size
from lmu_hf.model.costs import CHUNKS
from lmu_hf.model.memory import linear_memory
from lmu_hf.model.plan import Plan

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

# How often the grids are walked.
PASSES = 3
# Seconds for which a shorter call is repeated, so that it is not its threads' waking up that is compared.
SHORT = 0.02


def run(*, runs: int, names: list[str] | None = None, **_) -> dict:
    """Walks both grids, forward and with backward: list of sizes, ms of each way, the choice and what it costs."""
    torch.manual_seed(0)
    walks: dict[str, list[list[_Compared]]] = {name: [] for name in names or ("memories", "layers")}
    both, own = (False, True), -(-runs // PASSES)
    for number in range(PASSES):
        if "memories" in walks:
            walks["memories"].append([_memory(*sizes, training, own) for training in both for sizes in MEMORIES])
        if "layers" in walks:
            layers = itertools.product(both, LAYERS, both)
            walks["layers"].append([_layer(*sizes, coupled, training, own) for training, sizes, coupled in layers])
        print(f"  walked {number + 1} of {PASSES} times", flush=True)
    report = {}
    for name, walked in walks.items():
        report[name] = [_report(same) for same in zip(*walked, strict=True)]
        costs = [one["cost"] for one in report[name]]
        worse = sum(cost > 1.15 for cost in costs)
        print(f"{name}: {len(costs)} sizes, mean {statistics.mean(costs):.3f}, worst {max(costs):.2f}, {worse} above 1.15")
    return report


class _Compared(NamedTuple):
    """Sizes, the way that "auto" takes there, and ms of each way, as often as it ran."""

    sizes: dict
    chosen: str
    ms: dict[str, list[float]]


def _memory(rows: int, steps: int, order: int, training: bool, runs: int) -> _Compared:
    layer = LMU(1, 1, order, 2.0 * steps, return_sequences=True, kernel_initializer=None)
    system = layer.cell.system()
    u = torch.randn(rows, steps, 1, requires_grad=training)
    chosen = layer.explain(rows, steps, training=training)

    def call(algorithm, chunk):
        with torch.set_grad_enabled(training), mock.patch("lmu_hf.model.memory.memory_chunk", return_value=chunk):
            states, _ = linear_memory(u, system, algorithm=algorithm)
        if training:
            states.backward(torch.ones_like(states))

    ways = [("fft", 0), *(("chunked", size) for size in CHUNKS[2:] if size < 2 * max(steps, 4))]
    if order <= 32:
        ways.append(("scan", 0))
    sizes = {"rows": rows, "steps": steps, "order": order, "training": training}
    return _compared(sizes, ways, call, chosen, runs)


def _layer(
    batch: int, steps: int, dims: int, order: int, hidden: int, cell: str, coupled: bool, training: bool, runs: int
) -> _Compared:
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
        ways.append(("relaxed", block_size(steps)))
    else:
        ways = [(memory, size) for memory in ("folded", "written") for size in (8, 16, 32, 64) if size <= max(steps, 8)]
        ways.append(("convolved", 0))
    ways.append(("merged", 0))
    sizes = {"batch": batch, "steps": steps, "memory_d": dims, "order": order, "cell": cell, "hidden": hidden}
    return _compared({**sizes, "coupled": coupled, "training": training}, ways, call, chosen, runs)


def _compared(sizes: dict, ways: list[tuple[str, int]], call, plan: Plan, runs: int) -> _Compared:
    """Runs each way in turn."""
    chosen = (plan.memory, plan.chunk)
    if chosen not in ways:
        ways.append(chosen)
    for way in ways:
        call(*way)
    times: dict[str, list[float]] = {_name(way): [] for way in ways}
    for _ in range(runs):
        for way in ways:
            times[_name(way)].append(timed(lambda way=way: call(*way), SHORT))
    return _Compared(sizes, _name(chosen), times)


def _name(way: tuple[str, int]) -> str:
    memory, chunk = way
    return f"{memory} {chunk}" if chunk else memory


def _report(passes: tuple[_Compared, ...]) -> dict:
    """For one size the median ms of each way over all passes, and what the chosen one takes in shares of the shortest."""
    sizes, chosen, ways = passes[0]
    ms = {way: statistics.median(time for own in passes for time in own.ms[way]) for way in ways}
    best = min(ms, key=ms.__getitem__)
    cost = ms[chosen] / ms[best]
    if cost > 1.15:
        print(f"  {sizes}: took {chosen}, {cost:.2f} of {best}", flush=True)
    return {**sizes, "ms": {way: round(time, 4) for way, time in ms.items()}, "chosen": chosen, "cost": round(cost, 3)}
