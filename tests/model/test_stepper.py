"""Single steps of a layer, prepared once, against the cell."""

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
