"""The memory folded into the weights that read it, against powers one by one."""

import pytest
import torch

from lmu_hf.model import folding
from lmu_hf.model.legendre import delay_system

F64 = torch.float64


@pytest.fixture(params=["kept", "by doubling"])
def powers(request, monkeypatch):
    """Whether powers are kept in one matrix, or applied to each weight anew, as where they are too many."""
    if request.param == "by doubling":
        monkeypatch.setattr(folding, "_STACKED", 0)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize(("dims", "theta"), [(1, 9.0), (3, 9.0), (1, (9.0,)), (3, (9.0, 7.5, 20.0))])
def test_powers_and_inputs(powers, dims, theta, count):
    torch.manual_seed(0)
    order, width = 5, 4
    system = delay_system(order, theta)
    A, B = (part.expand(dims, *part.shape[1:]) for part in system.matrices(F64, "cpu"))
    weight = torch.randn(dims, order, width, dtype=F64, requires_grad=True)
    applied = folding.applied_powers(weight, system, count)
    of_memory, of_u = folding.one_step_on(weight, system)
    fold, from_u = folding.input_operators(weight.flatten(0, 1), system, dims, count)

    expected = torch.stack([torch.linalg.matrix_power(A.mT, i) @ weight for i in range(count + 1)], dim=2)
    responses = torch.einsum("dn,dniw->diw", B, expected)
    # (C, D, C, W): input i of the chunk -> step j
    to_steps = torch.zeros(count, dims, count, width, dtype=F64)
    for i in range(count):
        to_steps[i, :, i:] = responses[:, : count - i]
    pairs = [
        (applied, expected[:, :, :count]),
        (of_memory, expected[:, :, 1]),
        (of_u, responses[:, 0]),
        (fold.view(dims, order, count, width), expected[:, :, 1:]),
        (from_u.view(to_steps.shape), to_steps),
    ]
    for ours, theirs in pairs:
        # Float64, in which sums through eight powers in another order stayed below 2e-14.
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
        factors = torch.randn_like(theirs)
        gradients = [torch.autograd.grad((part * factors).sum(), weight, retain_graph=True)[0] for part in (ours, theirs)]
        assert torch.allclose(*gradients, rtol=0, atol=1e-12)
