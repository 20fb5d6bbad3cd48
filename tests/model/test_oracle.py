"""The layer against the reference implementation: outputs, memory, hidden states and every gradient."""

import oracle
import pytest
import torch

# float64: accumulated rounding of a dozen steps. float32: inputs of order 1, eps 1.2e-7, sums of ~100 terms.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.detach().double() - theirs.reshape(ours.shape)).abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", oracle.NAMES)
@pytest.mark.parametrize("algorithm", ["auto", "naive", "chunked", "fft"])
def test_sequence(name, dtype, algorithm):
    golden = oracle.Oracle(name)
    layer = golden.build(dtype)
    if algorithm in ("chunked", "fft") and layer.cell.coupled:
        with pytest.raises(ValueError, match="feed the state back"):
            layer.algorithm = algorithm
        return
    layer.algorithm = algorithm
    x = golden["x"].to(dtype).requires_grad_()
    y, state = layer(x)
    assert difference(y, golden["y"]) < TOLERANCE[dtype]
    assert difference(state.memory.flatten(1), golden["m"][:, -1]) < TOLERANCE[dtype]
    for ours, theirs in zip(state.hidden, golden.states, strict=False):
        assert difference(ours, theirs[:, -1]) < TOLERANCE[dtype]

    (y * golden["g_out"].to(dtype)).sum().backward()
    # Gradients are larger than outputs (that of theta_inv is 30), so float32 is held to the same precision relatively.
    gradients = {"grad.x": (x.grad, golden["grad.x"])}
    gradients |= {name: (p.grad, golden.ours("grad.w", name)) for name, p in layer.named_parameters()}
    for key, (ours, theirs) in gradients.items():
        assert ours is not None, key
        assert difference(ours, theirs) < TOLERANCE[dtype] * max(1.0, float(theirs.abs().max())), key


@pytest.mark.parametrize("name", oracle.NAMES)
def test_cell_steps(name):
    golden = oracle.Oracle(name)
    cell = golden.build(torch.float64).cell
    state = None
    for t in range(golden["x"].shape[1]):
        y, state = cell(golden["x"][:, t], state)
        assert difference(y, golden["y"][:, t]) < 1e-10
        assert difference(state.memory.flatten(1), golden["m"][:, t]) < 1e-10
        for ours, theirs in zip(state.hidden, golden.states, strict=False):
            assert difference(ours, theirs[:, t]) < 1e-10


@pytest.mark.parametrize("name", oracle.NAMES)
def test_last_output_only(name):
    golden = oracle.Oracle(name)
    layer = golden.build(torch.float64)
    layer.return_sequences = False
    y, _ = layer(golden["x"])
    assert difference(y, golden["y"][:, -1]) < 1e-10


@pytest.mark.parametrize("name", oracle.NAMES)
def test_matrices(name):
    golden = oracle.Oracle(name)
    cell = golden.build(torch.float64).cell
    assert difference(cell.A, golden["A"]) < 1e-12
    assert difference(cell.B, golden["B"]) < 1e-12
