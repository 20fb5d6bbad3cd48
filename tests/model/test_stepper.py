"""Single steps of a layer, prepared once, against the cell."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lmu_hf import LMU

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


def test_float32_of_many_numbers(loop):
    """Past the last whole vector of what makes u, too."""
    layer = LMU(77, 3, 19, 30.0, "gru", 37, hidden_to_memory=True, memory_to_memory=True)
    x = torch.randn(30, 3, 77)
    output = run(layer.stepper(3), x)
    exact = run(layer.double().stepper(3), x.double())
    assert (output - exact).abs().max() < 1e-4
