"""Single steps of a layer, prepared once, against the cell."""

import copy
import gc
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lmu_hf import LMU
from lmu_hf.model import stepper
from lmu_hf.model.hodlr import hodlr
from lmu_hf.model.legendre import delay_system, smallest_stable_theta

LAYERS = {
    "rnn": ((3, 2, 5, 9.0, "rnn", 4), {}),
    "all": (
        (3, 2, 5, 9.0, "rnn", 4),
        {"hidden_to_memory": True, "memory_to_memory": True, "input_to_hidden": True, "use_bias": True},
    ),
    "lstm": ((3, 2, 5, 9.0, "lstm", 4), {"hidden_to_memory": True, "input_to_hidden": True}),
    "gru": ((3, 1, 17, 9.0, "gru", 33), {"memory_to_memory": True}),
    "dense": ((3, 2, 5, (9.0, 30.0), "dense", 4), {"hidden_to_memory": True, "hidden_act": "relu"}),
    "no_kernel": ((2, 6, 5, 9.0, "rnn", 4), {"hidden_to_memory": True, "kernel_initializer": None}),
    "memory": ((3, 2, 5, (9.0, 30.0)), {"input_to_hidden": True}),
    "memory_alone": ((3, 2, 5, 9.0), {"trainable_theta": True}),
    "torch_gru": ((3, 2, 5, 9.0, nn.GRUCell(10, 4)), {}),
    "encoder_act": ((3, 2, 5, 9.0, "rnn", 4), {"encoder_act": "relu"}),
    "no_gates": ((3, 2, 5, 9.0, "rnn", 4), {"hidden_act": "gelu"}),
    "stack": ((3, 2, 5, 9.0, ["rnn", "lstm"], 4), {"hidden_to_memory": True}),
    "readout": ((2, 2, 5, 9.0, "readout"), {}),
}
BY_STEP = ("no_gates", "stack", "readout")


def build(name, dtype=torch.float64):
    arguments, options = LAYERS[name]
    layer = LMU(*arguments, **options).to(dtype)
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if not key.endswith("theta_inv"):
                parameter.uniform_(-0.6, 0.6)
    return layer


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_cell(name, batch, loop):
    layer = build(name)
    stepper = layer.stepper(batch)
    expected_loop = "step by step" if name in BY_STEP else loop
    assert stepper.loop == expected_loop
    state = None
    for t in range(20):
        x = torch.randn(batch, layer.cell.input_size, dtype=torch.float64)
        expected, state = layer.cell(x, state)
        output = stepper(x)
        assert output.shape == expected.shape
        assert (output - expected).abs().max() < 1e-12
        if t == 9:
            # Where one goes on from elsewhere, and where one stream of several begins anew.
            stepper.state = stepper.state
            stepper.reset([batch - 1])
            for tensor in state.tensors():
                tensor.detach()[batch - 1] = 0
    for ours, theirs in zip(stepper.state.tensors(), state.tensors(), strict=True):
        assert (ours - theirs).abs().max() < 1e-12


def test_dropout_is_off(loop):
    layer = LMU(3, 2, 5, 9.0, "rnn", 4, dropout=0.5)
    x = torch.randn(1, 3)
    stepper = layer.stepper()
    assert layer.training
    torch.testing.assert_close(stepper(x), layer.eval().cell(x)[0], rtol=0, atol=1e-6)


def test_outputs_and_states_are_copies(loop):
    stepper = build("memory_alone").stepper()
    x = torch.randn(1, 3, dtype=torch.float64)
    first, state = stepper(x), stepper.state
    kept = first.clone(), state.memory.clone()
    stepper(x)
    assert torch.equal(first, kept[0])
    assert torch.equal(state.memory, kept[1])


def test_half_precision():
    layer = build("all", torch.bfloat16)
    stepper = layer.stepper()
    x = torch.randn(1, 3, dtype=torch.bfloat16)
    assert stepper.loop == "step by step"
    assert torch.equal(stepper(x), layer.cell(x)[0])


def test_errors():
    layer = LMU(3, 2, 5, 9.0, "rnn", 4)
    with pytest.raises(ValueError, match="batch_size: expected a whole number of streams >= 1, found 0"):
        layer.stepper(0)
    with pytest.raises(ValueError, match=r"one sample per stream, \(2, 3\) of torch.float32, found \(1, 3\)"):
        layer.stepper(2)(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="bidirectional=True begins at the end"):
        LMU(3, 2, 5, 9.0, bidirectional=True).stepper()


def run(step, x):
    return torch.stack([step(part) for part in x])


@pytest.mark.parametrize("dims", [1, 2])
def test_weights_are_those_of_when_it_was_made(dims, loop):
    layer = LMU(1, dims, 4, 9.0, "rnn", 5, hidden_to_memory=True, memory_to_memory=True, use_bias=True)
    x = torch.randn(20, 1, 1)
    expected = run(layer.stepper(), x)
    step = layer.stepper()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert run(step, x).equal(expected)


def test_made_in_inference_mode(loop):
    layer = LMU(3, 2, 4, 9.0, "rnn", 5)
    x = torch.randn(9, 1, 3)
    with torch.inference_mode():
        step = layer.stepper()
    assert run(step, x).equal(run(layer.stepper(), x))


def test_a_stepper_is_not_copied():
    step = LMU(3, 2, 4, 9.0, "rnn", 5).stepper()
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"make one with layer.stepper\(\) and assign its state"):
            copied(step)


@pytest.mark.parametrize("order", [4, 256])
def test_autocast_changes_nothing(order, loop):
    layer = LMU(1, 1, order, 300.0, "rnn", 5, memory_to_memory=True)
    x = torch.randn(40, 1, 1)
    expected = run(layer.stepper(), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(layer.stepper(), x).equal(expected)


def test_an_infinite_hidden_state_stays_out_of_the_memory(loop):
    layer = LMU(1, 1, 4, 9.0, "rnn", 5, hidden_act="relu")
    with torch.no_grad():
        layer.cell.hidden_cell.weight_hh.copy_(1e9 * torch.eye(5))
        layer.cell.hidden_cell.weight_ih.fill_(1.0)
    step = layer.stepper(2)
    output = run(step, torch.rand(50, 2, 1))
    assert not output.isfinite().all()
    assert step.state.memory.isfinite().all()


def test_samples_however_they_lie_in_memory(loop):
    layer = LMU(3, 2, 4, 9.0, "rnn", 5)
    x = torch.randn(9, 2, 3)
    expected = run(layer.stepper(2), x)
    assert run(layer.stepper(2), x.repeat(1, 1, 2)[..., :3]).equal(expected)
    assert run(layer.stepper(2), x.mT.contiguous().mT).equal(expected)
    assert run(layer.stepper(2), torch.complex(x, -x).conj().imag).equal(expected)
    assert run(layer.stepper(2), x.requires_grad_()).equal(expected)


@pytest.mark.usefixtures("compiled_loop")
def test_the_compiled_step_goes_another_way_without_headers_of_python(monkeypatch):
    layer, x = LMU(3, 2, 4, 9.0, "rnn", 5, hidden_to_memory=True), torch.randn(6, 2, 3)
    expected = run(layer.stepper(2), x)
    monkeypatch.setattr(stepper, "_function_of", lambda stream: None)
    step = layer.stepper(2)
    assert run(step, x).equal(expected)
    with pytest.raises(ValueError, match=r"found \(1, 3\)"):
        step(torch.zeros(1, 3))


@pytest.mark.usefixtures("compiled_loop")
def test_a_compiled_step_lives_as_long_as_it_is_held():
    step = LMU(3, 2, 4, 9.0, "rnn", 5).stepper()
    expected = step(torch.ones(1, 3))
    step.reset()
    function, references = step._run, sys.getrefcount(step._run)
    del step
    gc.collect()
    assert sys.getrefcount(function) == references - 1  # that of the stepper is gone, and no other is left
    assert function(torch.ones(1, 3)).equal(expected)


def test_float32_of_many_numbers(loop):
    """Past the last whole vector of what makes u, too."""
    layer = LMU(77, 3, 19, 30.0, "gru", 37, hidden_to_memory=True, memory_to_memory=True)
    x = torch.randn(30, 3, 77)
    output = run(layer.stepper(3), x)
    exact = run(layer.double().stepper(3), x.double())
    assert (output - exact).abs().max() < 1e-4


# Orders of whole and of broken leaves, and a system per dimension whose ranks differ.
HODLR = [(256, 784.0), (200, 500.0), (150, 2000.0), (301, (300.0, 3000.0))]


@pytest.mark.parametrize(("order", "theta"), HODLR)
@pytest.mark.parametrize("discretizer", ["zoh", "euler"])
def test_hodlr_is_as_exact_as_rounding(order, theta, discretizer):
    if discretizer == "euler":
        theta = 2.0 * smallest_stable_theta(order)
    matrices = delay_system(order, theta, discretizer).Ad
    form = hodlr(matrices, torch.float32)
    assert form is not None
    assert 2 * (form.inward.numel() + form.outward.numel()) < matrices.numel()
    x = torch.randn(50, order, dtype=torch.float64)
    exact, rounded = x @ matrices, x @ matrices.float().double()
    error = (naive_hodlr_product(x, form) - exact).norm()
    assert error < 2 * (rounded - exact).norm()
    # Rounding of float64 fills the blocks: nothing would be saved.
    assert hodlr(matrices, torch.float64) is None or discretizer == "euler"


def naive_hodlr_product(x, form):
    """x (rows, N) times each of the matrices (S, N, N)."""
    leaves, leaf = form.inward.shape[1:3]
    parts = F.pad(x, (0, leaves * leaf - x.shape[1])).double().unflatten(1, (leaves, leaf))
    sent = torch.einsum("bpl,splr->sbpr", parts, form.inward.double())
    arrived, halves = [], 2
    for part in sent.split(form.ranks, dim=3):
        sums = part.unflatten(2, (halves, -1)).sum(3)
        arrived.append(sums[:, :, torch.arange(halves) ^ 1].repeat_interleave(leaves // halves, dim=2))
        halves *= 2
    read = torch.cat([parts.expand(len(sent), -1, -1, -1), *arrived], dim=3)
    return torch.einsum("sbpk,spkl->sbpl", read, form.outward.double()).flatten(2)[:, :, : x.shape[1]]


def test_matrices_that_have_no_hodlr_form():
    assert hodlr(torch.randn(1, 200, 200), torch.float32) is None
    assert hodlr(delay_system(128, 784.0).Ad, torch.float32) is None
    assert hodlr(torch.full((1, 200, 200), torch.nan), torch.float32) is None
    form = hodlr(torch.eye(150).expand(1, 150, 150), torch.float32)
    assert form.ranks == [0, 0]
    x = torch.randn(4, 150, dtype=torch.float64)
    assert naive_hodlr_product(x, form)[0].equal(x)


@pytest.mark.parametrize(("order", "theta"), HODLR)
@pytest.mark.parametrize("batch", [1, 9])
def test_long_memories_in_float32(order, theta, batch, loop):
    """No further from float64 than the plain loop over steps in float32 is. Without feedback, which would magnify chance."""
    dims = 2 if isinstance(theta, tuple) else 1
    layer = LMU(2, dims, order, theta, "rnn", 5)
    x = torch.randn(200, batch, 2)
    found = layer.stepper(batch)
    output = run(found, x).double()
    plain, state = [], None
    with torch.no_grad():
        for part in x:
            step, state = layer.cell(part, state)
            plain.append(step)
        exact = layer.double().stepper(batch)
        expected = run(exact, x.double())
        memory = exact.state.memory
    assert (output - expected).norm() < 2 * (torch.stack(plain).double() - expected).norm()
    assert (found.state.memory.double() - memory).norm() < 2 * (state.memory.double() - memory).norm()
