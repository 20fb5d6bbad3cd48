"""How long it takes until a layer is there: imports in fresh processes, and the first and second layer of order 256."""

import statistics
import subprocess
import sys

IMPORTS = (
    "import transformers",
    "import torch",
    "from transformers import PreTrainedModel",
    "import lmu_hf",
    "from lmu_hf import LMU",
    "from lmu_hf import LMUModel",
)
BUILD = """
import time, torch
from lmu_hf import LMU
for _ in range(2):
    start = time.perf_counter()
    LMU(1, 1, 256, 784.0, "rnn", 212, hidden_to_memory=True, memory_to_memory=True, input_to_hidden=True).cell.A
    print(1e3 * (time.perf_counter() - start))
"""
TIMED = "import time; start = time.perf_counter(); {}; print(1e3 * (time.perf_counter() - start))"


def run(*, runs: int, **_) -> dict:
    """Times all, in ms, in turn."""
    results: dict = {name: [] for name in (*IMPORTS, "first layer", "second layer")}
    for _ in range(runs):
        for statement in IMPORTS:
            results[statement] += _said(TIMED.format(statement))
        first, second = _said(BUILD)
        results["first layer"].append(first)
        results["second layer"].append(second)
    for name, times in results.items():
        print(f"{name:42s} {statistics.median(times):8.1f} ms   {min(times):.1f} to {max(times):.1f}", flush=True)
    return results


def _said(code: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [round(float(line), 2) for line in done.stdout.split()]
