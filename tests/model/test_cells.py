"""Hidden cells against torch's own, and the protocol for everybody else's."""

import pytest
import torch
from torch import nn

from lmu_hf.model import cells
from lmu_hf.model.cell_registry import build_hidden_cell, register_hidden_cell
from lmu_hf.model.layer import LMU

SIZES = {"memory_d": 2, "order": 3, "input_size": 4, "input_to_hidden": False}


@pytest.mark.parametrize(("name", "reference"), [("rnn", nn.RNNCell), ("lstm", nn.LSTMCell), ("gru", nn.GRUCell)])
def test_equals_torch(name, reference):
    ours = build_hidden_cell(name, **SIZES, hidden_size=5, dtype=torch.float64)
    theirs = reference(6, 5, dtype=torch.float64)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.uniform_(-1, 1)
        theirs.weight_ih.copy_(ours.weight_ih)
        theirs.weight_hh.copy_(ours.weight_hh)
        theirs.bias_ih.copy_(ours.bias)
        theirs.bias_hh.copy_(ours.bias_hh if name == "gru" else torch.zeros_like(ours.bias))
    z = torch.randn(3, 6, dtype=torch.float64)
    state = tuple(torch.randn(3, size, dtype=torch.float64) for size in ours.state_sizes)
    output, new_state = ours(z, state)
    expected = theirs(z, state if name == "lstm" else state[0])
    expected = expected if name == "lstm" else (expected,)
    assert torch.allclose(output, expected[0], rtol=0, atol=1e-14)
    for ours_part, theirs_part in zip(new_state, expected, strict=True):
        assert torch.allclose(ours_part, theirs_part, rtol=0, atol=1e-14)


def test_gru_that_resets_before_the_product():
    """The equations of Cho et al. (2014), as Keras 2 has them: its gates z, r, h, one bias, its hard sigmoid."""
    cell = cells.GRUCell(6, 5, reset_after=False, recurrent_activation="hard_sigmoid_keras2", dtype=torch.float64)
    assert [name for name, _ in cell.named_parameters()] == ["weight_ih", "weight_hh", "bias"]
    torch.nn.init.uniform_(cell.bias)
    z, h = torch.randn(3, 6, dtype=torch.float64), 3 * torch.randn(3, 5, dtype=torch.float64)
    W, U, b = (parameter.detach().split(5) for parameter in (cell.weight_ih, cell.weight_hh, cell.bias))
    reset, update = (torch.clip(0.2 * (z @ W[i].T + h @ U[i].T + b[i]) + 0.5, 0, 1) for i in (0, 1))
    candidate = torch.tanh(z @ W[2].T + (reset * h) @ U[2].T + b[2])
    expected = update * h + (1 - update) * candidate
    assert torch.allclose(cell(z, (h,))[0], expected, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="reset_after: expected True or False, found 'no'"):
        cells.GRUCell(6, 5, reset_after="no")


@pytest.mark.parametrize("module", [nn.RNNCell(6, 5), nn.LSTMCell(6, 5), nn.GRUCell(6, 5), nn.Linear(6, 5)], ids=str)
def test_torch_modules_are_cells(module):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    layer = LMU(4, 2, 3, 7.0, module, return_sequences=True, hidden_to_memory=True)
    assert layer(torch.randn(2, 6, 4)).shape == (2, 6, 5)
    assert layer.cell.hidden_cell.recurrent == (not isinstance(module, nn.Linear))
    # The caller's weights are the caller's: building a layer around them must not draw new ones.
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_readout_formula():
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    layer = LMU(3, 3, 5, 8.0, "readout", kernel_initializer=None, return_sequences=True, dtype=torch.float64)
    cell = layer.cell.hidden_cell
    bare = LMU(3, 3, 5, 8.0, kernel_initializer=None, return_sequences=True, dtype=torch.float64)
    memory = bare(x).unflatten(-1, (3, 5))
    with torch.no_grad():
        cell.skip.uniform_(-1, 1)
    expected = torch.einsum("dn,btdn->btd", cell.decoder, memory) + cell.skip * x
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-13)
    # Depthwise: a channel sees itself only.
    other = x.clone()
    other[..., 1] += 1
    assert torch.equal(layer(x)[..., [0, 2]], layer(other)[..., [0, 2]])


def test_readout_without_matching_input_has_no_skip():
    assert LMU(4, 3, 5, 8.0, "readout").cell.hidden_cell.skip is None
    assert LMU(3, 3, 5, 8.0, {"name": "readout", "skip": False}).cell.hidden_cell.skip is None
    for arguments in (
        {"hidden_cell": {"name": "readout", "skip": True}},
        {"hidden_cell": "readout", "input_to_hidden": True},
    ):
        with pytest.raises(ValueError, match="one input per memory dimension"):
            LMU(4, 3, 5, 8.0, **arguments)


def test_stack():
    layer = LMU(4, 2, 3, 7.0, [{"name": "lstm", "hidden_size": 5}, nn.GRUCell(5, 6), "dense"], 7, return_state=True)
    output, state = layer(torch.randn(2, 6, 4))
    assert output.shape == (2, 7)
    assert [part.shape[1] for part in state.hidden] == [5, 5, 6, 7]
    assert layer.cell.hidden_cell.recurrent


def test_forget_gate_starts_open():
    bias = build_hidden_cell("lstm", **SIZES, hidden_size=5).bias
    assert bias.tolist() == [0.0] * 5 + [1.0] * 5 + [0.0] * 10


class Leaky(nn.Module):
    """A cell of somebody else's: leaky integration of the mean of its inputs."""

    def __init__(self, input_size, hidden_size, leak=0.5):
        super().__init__()
        self.input_size, self.output_size, self.state_sizes = input_size, hidden_size, (hidden_size,)
        self.leak = leak

    def forward(self, z, state):
        y = self.leak * state[0] + z.mean(-1, keepdim=True)
        return y, (y,)


def test_own_cell_by_name():
    register_hidden_cell("leaky", Leaky)
    try:
        layer = LMU(4, 2, 3, 7.0, {"name": "leaky", "hidden_size": 5, "leak": 0.25}, return_sequences=True)
        assert layer.cell.hidden_cell.leak == 0.25
        assert layer(torch.randn(2, 6, 4)).shape == (2, 6, 5)
        with pytest.raises(ValueError, match="'leaky' could not be built"):
            LMU(4, 2, 3, 7.0, {"name": "leaky", "hidden_size": 5, "leek": 0.25})
    finally:
        from lmu_hf.model import cell_registry

        del cell_registry._REGISTRY["leaky"]


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        ("transformer", 5, "found 'transformer'; a cell of your own"),
        ("rnn", None, "hidden_size: expected a whole number"),
        ("rnn", 0, "hidden_size: expected a whole number"),
        ({"size": 5}, None, "mapping with 'name'"),
        ({"name": "rnn", "units": 5}, 5, "unexpected keyword argument 'units'"),
        ({"name": "rnn", "activation": "swoosh"}, 5, "hidden_act: expected one of"),
        (nn.RNNCell(9, 5), None, "expects 9 inputs, but the layer gives it 6"),
        (nn.ReLU(), None, "lacks .*input_size"),
        ([], None, "at least one cell"),
        (["rnn", "readout"], 5, "first cell of a stack"),
        ("readout", 5, "one output per memory dimension"),
    ],
)
def test_errors(spec, size, message):
    with pytest.raises(ValueError, match=message):
        build_hidden_cell(spec, **SIZES, hidden_size=size)


def test_builtin_names_cannot_be_taken():
    with pytest.raises(ValueError, match="built-in"):
        register_hidden_cell("rnn", Leaky)


@pytest.mark.parametrize("name", sorted(cells.ACTIVATIONS))
def test_every_activation_runs(name):
    cell = build_hidden_cell("rnn", **SIZES, hidden_size=5, hidden_act=name)
    assert cell(torch.randn(2, 6), (torch.zeros(2, 5),))[0].isfinite().all()
