"""The delay task in one picture and one file: errors of trained models, of the memory alone, and what a stream needs.

    python scripts/benchmarks/delay.py [FOLDER]

Reads ``delay-*.json`` of a folder (model_cards by default), the records of ``lmu-hf train configs/delay-*.yaml``. Writes
``delay/errors.png`` and ``delay/memory.json`` beside them. Minutes, most of them for the longest delay.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import torch
from worker import resident

from lmu_hf import LMU, LMUConfig, LMUForTimeSeriesPrediction
from lmu_hf.kinds import KINDS
from lmu_hf.plots import delay_errors
from lmu_hf.record import as_text, hardware, versions
from lmu_hf.tasks import load_task
from lmu_hf.tasks.delay import lags

ORDER, DELAYS, TARGETS, ROWS = 100, (100, 1_000, 10_000, 100_000), 5, 4
WARM, STEPS = 500, 20_000


def window_read_out(delay: int) -> dict:
    """Errors of reading the window by its own polynomials: nothing is trained at all."""
    task = load_task("delay", delay=delay, rows=2 * ROWS)
    layer = LMU(1, 1, ORDER, 1.05 * delay, kernel_initializer=None, hidden_cell=None, return_sequences=True)
    meter = KINDS["series"].meter(task.label_names)
    part, difference = task.parts["test"], 0.0
    for values, labels in zip(part.values, part.labels, strict=True):
        memory = layer(values[None])[:, delay:, None]
        found = layer.reconstruct(memory, lags(delay, TARGETS))[:, :, 0]
        meter.add(found, labels[None, delay:])
    # How much of the error is rounding: the last row again in double precision.
    exact = layer.double()(values[None].double())[:, delay:, None]
    difference = float((memory.double() - exact).abs().max() / exact.abs().max())
    details = meter.details()
    return {**meter.scores(), "targets": details["targets"], "rows": details["rows"], "float32_difference": difference}


def stream(delay: int) -> None:
    """Runs in a process of its own: prints what steps of one stream add to the memory that the process holds."""
    torch.set_num_threads(1)
    config = LMUConfig(order=ORDER, theta=1.05 * delay, hidden_cell=None, kernel_initializer=None, target_size=TARGETS)
    stream = LMUForTimeSeriesPrediction(config).eval().streamer()
    noise = torch.randn(WARM + STEPS, 1, 1)
    for index in range(WARM):  # a loop over the tensor would hold a view of each of its steps
        stream.step(noise[index])
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    started = time.perf_counter()
    for index in range(WARM, WARM + STEPS):
        stream.step(noise[index])
    seconds = time.perf_counter() - started
    state = sum(tensor.numel() * tensor.element_size() for tensor in stream.cache.states[0].tensors())
    extra = resident("VmHWM") - before
    print(
        json.dumps(
            {"state_bytes": state, "extra_kib": extra, "steps": STEPS, "microseconds_per_step": 1e6 * seconds / STEPS}
        )
    )


def main(folder: Path) -> None:
    seeds: dict[str, dict[int, list]] = {}
    for path in sorted(folder.glob("delay-*.json")):
        result = json.loads(path.read_text())
        kind = "LMU" if result["name"].startswith("delay-lmu") else "LSTM"
        name = f"{kind}, {result['parameters']['trainable']:,} parameters"
        delay = result["experiment"]["task"]["delay"]
        seeds.setdefault(name, {}).setdefault(delay, []).append(_shares(result["targets"]["test"]))
    curves = {
        name: {delay: {share: mean(run[share] for run in runs) for share in runs[0]} for delay, runs in by_delay.items()}
        for name, by_delay in seeds.items()
    }
    memory = {}
    for delay in DELAYS:
        with torch.no_grad():
            read = window_read_out(delay)
        curves.setdefault("window read-out, nothing trained", {})[delay] = _shares(read["targets"])
        command = [sys.executable, __file__, "--stream", str(delay)]
        streamed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        memory[str(delay)] = {"window_read_out": read, "stream": streamed}
        print(delay, json.dumps(memory[str(delay)]), flush=True)
    output = folder / "delay"
    output.mkdir(exist_ok=True)
    record = {"order": ORDER, "theta": "1.05 delay", "hardware": hardware(), "versions": versions(), "delays": memory}
    (output / "memory.json").write_text(as_text(record))
    delay_errors(curves, output / "errors.png")


def _shares(targets: dict[str, dict[str, float]]) -> dict[float, float]:
    steps = {int(name.split()[0]): metrics["nrmse"] for name, metrics in targets.items()}
    return {lag / max(steps): value for lag, value in steps.items()}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--stream"]:
        stream(int(sys.argv[2]))
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "model_cards")
