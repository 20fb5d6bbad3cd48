"""Measures LMUs on a CUDA device beside cuDNN's RNN, LSTM and GRU and the naive loop: forward and backward, interleaved runs.

    python scripts/benchmarks/gpu.py [CASE ...] [--runs 15] [--output FILE.json] [--picture FILE.png]
    python scripts/benchmarks/gpu.py --arithmetic        what has to be computed and moved; needs no device

Before anything is timed, outputs and all gradients are compared with the naive loop in float64. All products are of float32,
without tf32. Times are those of calls from Python; "graph" is the same layer captured by ``torch.cuda.make_graphed_callables``.
Prints medians with their spread, and what part of the device's own limits they are: the operations per second of a large product
and the bytes per second of a large copy, both measured at the start.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from cases import CASES
from roofline import Work, lmu_work, naive_work, peer_work, shares

NAMES = [name for name, case in CASES.items() if name.split("-")[0] in ("coupled", "uncoupled") and case["steps"] == 784]

GIB = 1 << 30  # the tensor that is copied, read and written

# Rounding in float32 through 784 coupled steps is 3e-5 of outputs and up to 1e-3 of gradients that nearly cancel.
TOLERANCE = 1e-3
GRAPH = ", graph"


def work_of(name: str, case: dict, plan) -> Work:
    """What a contender has to do."""
    if name.startswith("nn."):
        return peer_work(name.removesuffix(GRAPH), case)
    if name == "naive":
        return naive_work(case)
    return lmu_work(case, plan.chunk, folds=plan.memory != "written")


def build(case: dict, device: str):
    """The layer of a case, and an input."""
    import torch

    from lmu_hf import LMU

    torch.manual_seed(0)
    coupled = case.get("coupled", False)
    arguments = {"hidden_to_memory": coupled, "memory_to_memory": coupled, "input_to_hidden": True, "return_sequences": True}
    sizes = (case["input_size"], case["memory_d"], case["order"], float(case["theta"]), case["hidden"], case["hidden_size"])
    x = torch.randn(case["batch"], case["steps"], case["input_size"], device=device)
    return LMU(*sizes, **arguments).to(device), x


def contender(name: str, case: dict):
    """A function that runs forward and backward once and returns output and gradients, and the plan of an LMU."""
    import torch
    from torch import nn

    layer, x = build(case, "cuda")
    plan = layer.explain(case["batch"], case["steps"], training=True)
    if name.startswith("nn."):
        layer = getattr(nn, name[3:].removesuffix(GRAPH))(case["input_size"], case["hidden_size"], batch_first=True).cuda()
    elif name == "naive":
        layer.algorithm = "naive"
    if name == "exact":
        layer.algorithm = "naive"
        layer, x = layer.double(), x.double()
    torch.manual_seed(1)
    grad = torch.randn(case["batch"], case["steps"], case["hidden_size"], device="cuda").to(x.dtype)
    parameters = list(layer.parameters())
    if name.endswith(GRAPH):
        layer = torch.cuda.make_graphed_callables(layer, (x,))

    def run():
        output = layer(x)
        output = output[0] if isinstance(output, tuple) else output
        return [output.detach(), *torch.autograd.grad(output, parameters, grad)]

    return run, plan


def error(run, exact) -> float:
    """The largest relative error among output and gradients."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(run(), exact(), strict=True))


def limits() -> dict[str, float]:
    """Operations per second of a large product in float32, bytes per second of a large copy; the best of some runs."""
    import torch

    a = torch.randn(8192, 8192, device="cuda")
    b, product = torch.randn_like(a), torch.empty_like(a)
    source = torch.empty(GIB // 4, device="cuda")
    target = torch.empty_like(source)
    copy = min(timed(lambda: target.copy_(source)) for _ in range(10))
    multiply = min(timed(lambda: torch.mm(a, b, out=product)) for _ in range(10))
    return {"flops_per_s": 2 * 8192**3 / multiply * 1e3, "bytes_per_s": 2 * GIB / copy * 1e3}


def timed(run) -> float:
    """Milliseconds on the device and before it, from an empty queue to an empty queue."""
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(name: str, runs: int, device: dict) -> dict:
    """Checks and times all contenders of a case."""
    import torch

    case = CASES[name]
    result: dict = {"title": case["title"], "errors": {}, "ms": {}, "peak_mib": {}, "work": {}, "shares": {}}
    contenders = {}
    exact = contender("exact", case)[0]
    for one in ("ours", "ours" + GRAPH, "naive", *case["peers"], "nn.RNN" + GRAPH):
        run, plan = contender(one, case)
        if one.startswith("ours"):
            result["errors"][one] = error(run, exact)
            if not result["errors"][one] < TOLERANCE:
                raise SystemExit(f"{name}: {one} is not equal to the naive loop: relative error {result['errors'][one]:.1e}")
            result["plan"] = str(plan)
        for _ in range(3):
            run()  # compiles, allocates
        if not one.endswith(GRAPH):  # what a graph uses was allocated when it was made
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            run()
            result["peak_mib"][one] = (torch.cuda.max_memory_allocated() - held) / 2**20
        result["work"][one] = work_of(one, case, plan)._asdict()
        contenders[one] = run
        result["ms"][one] = []
    for _ in range(runs):
        for one, run in contenders.items():
            result["ms"][one].append(round(timed(run), 4))
    for one, times in result["ms"].items():
        result["shares"][one] = shares(Work(**result["work"][one]), statistics.median(times), **device)
    return result


def describe(result: dict) -> str:
    lines = [f"{result['title']}   (errors against float64: {result['errors']}; {result['plan']})"]
    ours = statistics.median(result["ms"]["ours"])
    for name, runs in result["ms"].items():
        median, share = statistics.median(runs), result["shares"][name]
        spread = f"{min(runs):.2f} to {max(runs):.2f}"
        memory = f"{result['peak_mib'][name]:.0f} MiB" if name in result["peak_mib"] else ""
        lines.append(
            f"  {name:13s} {median:9.3f} ms   {spread:18s} {median / ours:7.2f}x ours   {share['flops']:6.1%} of FLOP/s   "
            f"{share['bytes']:6.1%} of bytes/s   limit {share['limit_ms']:.3f} ms   {memory}"
        )
    return "\n".join(lines)


def draw(report: dict, path: Path) -> None:
    """Times, ours in orange, beside the shortest time that the device's limits allow, one panel per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = report["results"]
    columns = min(len(results), 3)
    rows = -(-len(results) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(4 * columns, 3.6 * rows), sharey=True, squeeze=False)
    for panel in panels.flat[len(results) :]:
        panel.remove()
    for panel, (name, result) in zip(panels.flat, results.items(), strict=False):
        names = list(result["ms"])
        medians = [statistics.median(result["ms"][one]) for one in names]
        spread = [
            [median - min(result["ms"][one]) for one, median in zip(names, medians, strict=True)],
            [max(result["ms"][one]) - median for one, median in zip(names, medians, strict=True)],
        ]
        colours = ["tab:orange" if one.startswith("ours") else "tab:blue" for one in names]
        panel.bar(names, medians, yerr=spread, capsize=3, color=colours, label="median, least to most")
        panel.plot(
            names, [result["shares"][one]["limit_ms"] for one in names], "k_", markersize=18, label="limit of the device"
        )
        panel.set_yscale("log")
        panel.set_title(name)
        panel.tick_params(axis="x", rotation=60)
        panel.tick_params(axis="y", labelleft=True)
    for row in panels:
        row[0].set_ylabel("ms, forward and backward")
    panels[0][0].legend(fontsize=7)
    figure.suptitle(report["device"])
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def arithmetic(names: list[str]) -> str:
    """The work of all contenders, on any machine."""
    lines = []
    for name in names:
        case = CASES[name]
        lines.append(case["title"])
        chunk = 32 if case.get("coupled") else 16
        works = {f"ours, {chunk} steps at a time": lmu_work(case, chunk), "naive": naive_work(case)}
        works.update({peer: peer_work(peer, case) for peer in case["peers"]})
        for one, work in works.items():
            lines.append(
                f"  {one:26s} {work.flops / 1e9:9.2f} GFLOP {work.bytes / 2**20:9.1f} MiB {work.intensity:8.1f} FLOP/byte "
                f"{work.matrix_bytes / 2**10:8.0f} KiB of matrices per step"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"some of {', '.join(NAMES)}; all by default")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--picture", type=Path, default=Path("gpu.png"))
    parser.add_argument("--arithmetic", action="store_true", help="only say what has to be computed and moved")
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(NAMES)
    if unknown:
        parser.error(f"unknown cases {sorted(unknown)}; there are {', '.join(NAMES)}")
    names = arguments.cases or NAMES
    if arguments.arithmetic:
        print(arithmetic(names))
        return 0
    import torch

    if not torch.cuda.is_available():
        print(f"this needs a CUDA device, and torch {torch.__version__} sees none; --arithmetic needs none", file=sys.stderr)
        return 2
    from lmu_hf.model.scan import scan_class

    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    device = limits()
    report: dict = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
        "loop": scan_class(torch.empty(1, device="cuda")).language,
        "limits": device,
        "results": {},
    }
    print({key: value for key, value in report.items() if key != "results"}, flush=True)
    for name in names:
        result = report["results"][name] = measure(name, arguments.runs, device)
        print(describe(result), flush=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    draw(report, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
