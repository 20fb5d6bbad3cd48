"""Uncoupled layers with a recurrent cell, and the gated scan, against the naive loops: outputs, states, every gradient."""

import pytest
import torch
from against_naive import CELLS, CONNECTIONS, F64, SYSTEMS, assert_equals_naive, build, take

from lmu_hf.model import chunked_scan, convolved, lookahead, time_loop, uncoupled
from lmu_hf.model.cell_registry import build_hidden_cell
from lmu_hf.model.gates import gate_weights
from lmu_hf.model.layer import LMU
from lmu_hf.model.recurrence import naive_scan


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_gated_scan(kind):
    cell = build_hidden_cell(
        kind, memory_d=2, order=3, input_size=1, input_to_hidden=False, hidden_size=4, hidden_act=None, dtype=F64
    )
    z = torch.randn(3, 11, 6, dtype=F64, requires_grad=True)
    state = tuple(torch.randn(3, size, dtype=F64, requires_grad=True) for size in cell.state_sizes)
    lengths = torch.tensor([11, 4, 0])
    sides = []
    weights = gate_weights(cell)
    for naive in (False, True):
        if naive:
            output, final = naive_scan(cell, z, state, lengths, return_sequence=True)
        else:
            base = z @ weights.input_weight + weights.bias
            output, final = uncoupled.gated_scan(weights, base, state, lengths, return_sequence=True)
        loss = output.square().sum() + sum((part * 1.5).sum() for part in final)
        sides.append([output, *final, *torch.autograd.grad(loss, [z, *state, *cell.parameters()])])
    for ours, naive in zip(*sides, strict=True):
        assert (ours - naive).abs().max() < 1e-12


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru", "torch_gru"])
@pytest.mark.parametrize("input_to_hidden", [False, True])
@pytest.mark.parametrize("folds", [False, True])
def test_uncoupled(cell, system, input_to_hidden, folds, loop, monkeypatch):
    take(monkeypatch, 16, "folded" if folds else "written")
    monkeypatch.setitem(CONNECTIONS, "none", {"input_to_hidden": input_to_hidden})
    layer = build(cell, "none", system)
    assert_equals_naive(layer, "auto", {2: None, 16: None, 39: [39, 16, 17, 0]})


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("cell", [*CELLS])
@pytest.mark.parametrize("connections", ["none", "i2h", "m2m"])
def test_convolved(cell, system, connections, loop, monkeypatch):
    if cell in ("dense", "torch_linear"):
        pytest.skip("nothing goes step by step")
    take(monkeypatch, 0, "convolved")
    monkeypatch.setattr(lookahead, "lookahead_chunk", lambda *_, **__: 4)
    for name in ("_ROWS", "_FEW_ROWS", "_NUMBERS"):
        monkeypatch.setattr(convolved, name, 1)  # several rounds
    monkeypatch.setitem(CONNECTIONS, "none", {})
    monkeypatch.setitem(CONNECTIONS, "i2h", {"input_to_hidden": True, "use_bias": True, "dropout": 0.3})
    layer = build(cell, connections, system)
    assert layer.explain(4, 39).memory == "convolved"
    assert_equals_naive(layer, "auto", {2: None, 16: None, 39: [39, 16, 17, 0, 5]}, batch=5, at_rest=True)


def test_convolved_rows_are_not_touched_by_what_is_not_finite(monkeypatch):
    take(monkeypatch, 0, "convolved")
    layer = LMU(3, 2, 4, 9.0, "gru", 5, return_sequences=True)
    x = torch.randn(4, 11, 3)
    exact = layer(x)
    x[1, 5] = float("nan")
    assert torch.equal(layer(x)[[0, 2, 3]], exact[[0, 2, 3]])


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("rows", [12, 1000])
def test_uncoupled_as_on_cuda(system, folds, rows, monkeypatch):
    """The memory at the start of all chunks at once, in several segments and in one."""
    take(monkeypatch, 2, "folded" if folds else "written")
    monkeypatch.setattr(time_loop, "starts_at_once", lambda like: True)
    monkeypatch.setattr(chunked_scan, "_ROWS", rows)
    monkeypatch.setitem(CONNECTIONS, "none", {"input_to_hidden": True})
    layer = build("rnn", "none", system)
    assert_equals_naive(layer, "auto", {2: None, 16: None, 39: [39, 16, 17, 0]})
