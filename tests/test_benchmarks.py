"""The arithmetic behind the benchmarks, against the products that really run."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lmu_hf import LMU
from lmu_hf.model import plan

FOLDER = Path(__file__).parents[1] / "scripts" / "benchmarks"


def module(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


roofline = module("roofline")

CASE = {
    "input_size": 2,
    "memory_d": 2,
    "order": 40,
    "theta": 60,
    "hidden": "rnn",
    "hidden_size": 30,
    "steps": 64,
    "batch": 6,
}


class Count(TorchDispatchMode):
    """Adds up the operations of all products."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "addmm_", "baddbmm"):
            left, right = [arg.shape for arg in args if isinstance(arg, torch.Tensor)][-2:]
            self.flops += 2 * left.numel() * right[-1]
        return func(*args, **(kwargs or {}))


def counted(layer, steps, batch, inputs):
    x = torch.randn(batch, steps, inputs)
    layer(x)  # the operators of the delay system are computed once, in float64
    with Count() as count:
        output = layer(x)
        (output[0] if isinstance(output, tuple) else output).sum().backward()
    return count.flops


@pytest.mark.parametrize("chunk", [4, 16])
@pytest.mark.parametrize("kind", ["coupled", "folded", "written", "naive coupled", "naive uncoupled"])
def test_operations_of_an_lmu(kind, chunk, python_loop, monkeypatch):
    way = ("lookahead" if kind == "coupled" else kind, chunk)
    monkeypatch.setattr(plan, "recurrence_algorithm", lambda *_, **__: way)
    coupled = "coupled" in kind.split()
    arguments = {"hidden_to_memory": coupled, "memory_to_memory": coupled, "input_to_hidden": True, "return_sequences": True}
    layer = LMU(2, 2, 40, 60.0, "rnn", 30, **arguments)
    layer.algorithm = "naive" if "naive" in kind else "auto"
    found = counted(layer, CASE["steps"], CASE["batch"], CASE["input_size"])
    case = {**CASE, "coupled": coupled}
    said = roofline.naive_work(case) if "naive" in kind else roofline.lmu_work(case, chunk, folds=kind == "folded")
    # What is left out: the final memory, the weights that are made of weights, the first and the last chunk.
    assert said.flops == pytest.approx(found, rel=0.1)


def test_operations_of_peers():
    for name, layer in (("nn.RNN", nn.RNN), ("nn.LSTM", nn.LSTM), ("nn.GRU", nn.GRU)):
        said = roofline.peer_work(name, CASE)
        gates = roofline.GATES[name] * CASE["hidden_size"]
        assert sum(p.numel() for p in layer(2, 30, bias=False).parameters()) == gates * (2 + 30)
        # Forwards, and backwards for the weights; and backwards for h, but not for x, which has no gradient.
        assert said.flops == 2 * 6 * 64 * gates * (2 * (2 + 30) + 30)


def test_bytes():
    case = {**CASE, "coupled": True}
    work = roofline.lmu_work(case, 16)
    assert work.matrix_bytes == 2 * 30 * 32 * 4
    # At least its sums forwards and backwards and its states; at most everything ten times.
    least = 6 * 64 * (2 * 32 + 30) * 4
    assert least < work.bytes < 10 * least + 40 * 16 * 2 * 40 * 32
    twice = roofline.lmu_work({**case, "batch": 12}, 16)
    assert work.bytes < twice.bytes < 2 * work.bytes
    assert work.intensity == work.flops / work.bytes


def test_shares():
    work = roofline.Work(flops=2e9, bytes=1e8, matrix_bytes=0)
    found = roofline.shares(work, 4.0, flops_per_s=1e12, bytes_per_s=1e11)
    assert found == pytest.approx({"flops": 0.5, "bytes": 0.25, "limit_ms": 2.0})


def script(*arguments):
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(FOLDER.parents[1])}
    command = [sys.executable, str(FOLDER / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_script_says_what_it_needs(tmp_path):
    result = script("coupled-1", "--output", str(tmp_path / "gpu.json"))
    assert result.returncode == 2
    assert "needs a CUDA device" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "gpu.json").exists()
    assert "unknown cases" in script("coupled-7").stderr
    table = script("--arithmetic", "uncoupled-100")
    assert table.returncode == 0
    assert "GFLOP" in table.stdout


def test_the_report(tmp_path, monkeypatch, capsys):
    """Everything around the device, with times made up."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(FOLDER))
    gpu = module("gpu")
    work = roofline.Work(2e9, 1e8, 0)
    one = {
        "ms": {"ours": [1.0, 1.1, 0.9], "nn.RNN": [2.0, 2.0, 2.5]},
        "errors": {"ours": 1e-5},
        "title": "a case",
        "plan": "a plan",
    }
    one["shares"] = {name: roofline.shares(work, 1.0, 1e13, 1e12) for name in one["ms"]}
    one["peak_mib"] = dict.fromkeys(one["ms"], 3.0)
    assert "2.00x ours" in gpu.describe(one)
    gpu.draw({"device": "none", "results": {"coupled-1": one, "coupled-32": one}}, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 1000
    assert [f"{kind}-{batch}" for kind in ("coupled", "uncoupled") for batch in (100, 32, 1)] == gpu.NAMES
