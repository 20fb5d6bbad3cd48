"""Coupled layers by relaxed convolutions, against the naive loops: outputs, states, every gradient."""

import pytest
import torch
from against_naive import CONNECTIONS, F64, SYSTEMS, as_if_large, assert_equals_naive, build, take

from lmu_hf.model import layer_costs, lookahead, relaxed
from lmu_hf.model.convolution import block_size
from lmu_hf.model.layer import LMU

pytestmark = pytest.mark.usefixtures("compiled_loop")

COUPLED = [name for name in CONNECTIONS if name != "m2m"]


# Blocks of 4, 5 and 27 steps, of which 39 and 150 are no power of two, and one block that is longer than the sequence.
@pytest.mark.parametrize("block", [4, 5, 27])
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("connections", COUPLED)
@pytest.mark.parametrize("cell", ["rnn", "rnn_no_bias", "lstm", "gru", "dense", "torch_lstm", "torch_gru"])
def test_equals_naive(cell, connections, system, block, monkeypatch):
    take(monkeypatch, block, "relaxed")
    layer = build(cell, connections, system)
    assert layer.explain(4, 39).memory == "relaxed"
    cases = {2: None, 16: None, 39: [39, 16, 17, 0], 150: None}
    if cell == "dense":
        del cases[150]  # grows without bounds
    assert_equals_naive(layer, "auto", cases, at_rest=True)


@pytest.mark.parametrize("batch", [1, 2, 9, 37])
@pytest.mark.parametrize("cell", ["rnn", "gru"])
def test_rows(cell, batch, monkeypatch):
    """More than a thread takes abreast, than lanes of a vector, and fewer."""
    take(monkeypatch, 4, "relaxed")
    assert_equals_naive(build(cell, "all", "scales"), "auto", {39: None}, batch=batch, at_rest=True)


@pytest.mark.parametrize("numbers", [1, 1 << 25])
@pytest.mark.parametrize("block", [4, 1, 30])
@pytest.mark.parametrize("connections", COUPLED)
@pytest.mark.parametrize("cell", ["rnn", "rnn_no_bias", "lstm", "gru"])
def test_large_matrices(cell, connections, block, numbers, monkeypatch):
    """Whose gradients products make, of all rows, or of one after the other."""
    take(monkeypatch, block, "relaxed")
    as_if_large(monkeypatch)
    monkeypatch.setattr(relaxed, "_NUMBERS", numbers)
    assert_equals_naive(build(cell, connections, "scales"), "auto", {2: None, 39: [39, 16, 17, 0]}, at_rest=True)


@pytest.mark.parametrize("trained", ["kernel", "weight_ih", "weight_hh", "bias"])
def test_some_gradients_of_large_matrices(trained, monkeypatch):
    take(monkeypatch, 4, "relaxed")
    layer = build("lstm", "all", "one")
    x = torch.randn(3, 21, 3, dtype=F64)
    weights = [parameter for name, parameter in layer.named_parameters() if name.endswith(trained)]
    assert weights
    found = []
    for large in (False, True):
        if large:
            as_if_large(monkeypatch)
        layer.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_()
        found.append(torch.autograd.grad(layer(x)[0].square().sum(), weights))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() < 1e-11 * max(1.0, float(other.abs().max()))


def test_order_256_in_float32(monkeypatch):
    """Rounding is no worse than that of the look-ahead."""
    torch.manual_seed(0)
    layer = LMU(1, 1, 256, 784.0, "rnn", 64, hidden_to_memory=True, memory_to_memory=True, return_sequences=True)
    x = torch.randn(4, 784, 1)
    exact = layer.double()(x.double()).float()
    layer.float()
    errors = {}
    for memory, steps in (("lookahead", 16), ("relaxed", block_size(784))):
        with monkeypatch.context() as patched:
            take(patched, steps, memory)
            errors[memory] = (layer(x) - exact).abs().max().item()
    assert errors["relaxed"] < 2 * errors["lookahead"] + 1e-6


def test_last_output_and_no_state(monkeypatch):
    take(monkeypatch, 4, "relaxed")
    layer = build("lstm", "all", "one")
    x, lengths = torch.randn(3, 19, 3, dtype=F64), torch.tensor([19, 4, 0])
    every, state = layer.run(x, None, lengths)
    last, none = layer.run(x, None, lengths, return_sequences=False, return_state=False)
    assert none is None
    assert state is not None
    assert torch.equal(last, torch.stack([every[0, 18], every[1, 3], torch.zeros_like(every[2, 0])]))


def test_rows_do_not_meet(monkeypatch):
    """Nor do steps reach those before them."""
    take(monkeypatch, 4, "relaxed")
    layer = LMU(3, 2, 4, 9.0, "gru", 5, hidden_to_memory=True, return_sequences=True)
    x = torch.randn(4, 50, 3)
    exact = layer(x)
    x[1, 21] = float("nan")
    found = layer(x)
    assert torch.equal(found[[0, 2, 3]], exact[[0, 2, 3]])
    assert torch.equal(found[1, :21], exact[1, :21])
    assert found[1, 21:].isnan().all()


@pytest.mark.parametrize("memory", ["relaxed", "lookahead"])
def test_inputs_of_any_strides(memory, monkeypatch):
    take(monkeypatch, 4, memory)
    wide = LMU(32, 1, 4, 9.0, "rnn", 5, hidden_to_memory=True, return_sequences=True, return_state=True, dtype=F64)
    windows = torch.randn(2, 41, dtype=F64).unfold(1, 32, 1)
    transposed = torch.randn(3, 3, 21, dtype=F64).mT
    for layer, x in ((build("rnn", "all", "one"), transposed), (wide, windows)):
        found = []
        for given in (x, x.contiguous()):
            given = given.detach().requires_grad_()
            output = layer(given)[0]
            found.append((output, *torch.autograd.grad(output.square().sum(), given)))
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("change", ["nothing", "a state", "an activation", "dropout", "the look-ahead by name"])
def test_taken_only_where_it_can_be(change, monkeypatch):
    """From an empty memory on, where u need not be known before the gates, and by "auto"."""
    monkeypatch.setattr(layer_costs, "relaxed_cost", lambda *_, **__: (4, 0.0))
    options = {"an activation": {"encoder_act": "tanh"}, "dropout": {"dropout": 0.3}}.get(change, {})
    layer = LMU(3, 2, 4, 9.0, "rnn", 5, hidden_to_memory=True, return_sequences=True, **options)
    if change == "the look-ahead by name":
        layer.algorithm = "lookahead"
    taken = []

    def relaxed_scan(*inputs, **options):
        taken.append(1)
        return relaxed.relaxed_scan(*inputs, **options)

    monkeypatch.setattr(lookahead, "relaxed_scan", relaxed_scan)
    x = torch.randn(2, 50, 3)
    layer(x, layer.cell.initial_state(x) if change == "a state" else None)
    assert bool(taken) == (change == "nothing")


def test_blocks():
    """Of 17 to 32 steps, which transform well; few more than all steps where a power of two of them covers these."""
    for steps in range(2, 3000):
        block = block_size(steps)
        assert block <= 32
        assert block > 16 or block >= steps
        assert (
            max(
                factor for factor in range(1, block + 1) if block % factor == 0 and all(factor % k for k in range(2, factor))
            )
            <= 5
        )
        blocks = -(-steps // block)
        assert (1 << (blocks - 1).bit_length()) * block < 1.2 * steps + block
