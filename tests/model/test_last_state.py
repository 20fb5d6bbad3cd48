"""What reaches the states after the last step alone takes a way of its own back, without a gradient for each step."""

import pytest
import torch
from against_naive import F64, build, take

from lmu_hf import LMU

COUPLED = [("lookahead", 4), ("relaxed", 4), ("merged", 0)]
ALONE = [("folded", 4), ("written", 4), ("convolved", 4), ("merged", 4)]


def gradients(layer, x, lengths, wanted):
    """The last output or the final states, and the gradients of their sums, weighted."""
    x = x.clone().requires_grad_()
    output, state = layer.run(x, None, lengths, return_sequences=False)
    results = {"output": [output], "states": state.tensors(), "both": [output, *state.tensors()]}[wanted]
    torch.manual_seed(1)
    loss = sum((result * torch.randn(result.shape, dtype=F64)).sum() for result in results)
    inputs = [x, *layer.parameters()]
    return [*results, *torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize("wanted", ["output", "states", "both"])
@pytest.mark.parametrize(("connections", "way"), [*(("all", way) for way in COUPLED), *(("m2m", way) for way in ALONE)])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_equals_naive(cell, connections, way, wanted, loop, monkeypatch):
    memory, chunk = way
    if loop == "python" and memory == "relaxed":
        pytest.skip("compiled loops only")
    take(monkeypatch, chunk, memory)
    torch.manual_seed(0)
    layer = build(cell, connections, "one")
    for steps, lengths in ((23, None), (8, None), (1, None), (23, torch.tensor([23, 0, 9]))):
        x = torch.randn(3, steps, 3, dtype=F64)
        layer.algorithm = "auto"
        ours = gradients(layer, x, lengths, wanted)
        layer.algorithm = "naive"
        for one, exact in zip(ours, gradients(layer, x, lengths, wanted), strict=True):
            assert (one - exact).abs().max() < 1e-11 * max(1.0, float(exact.detach().abs().max()))


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_h_is_not_written_twice(cell, compiled_loop, monkeypatch):
    """A merged run that returns its last output alone has no need for h beside [m, h]."""
    take(monkeypatch, 0, "merged")
    layer = LMU(3, 2, 4, 9.0, cell, 5, hidden_to_memory=True)
    written = []
    forward = torch.ops.lmu_hf.recurrent_forward
    monkeypatch.setattr(
        torch.ops.lmu_hf, "recurrent_forward", lambda *inputs: (written.append(inputs[-1]), forward(*inputs))
    )
    for return_sequences in (True, False):
        layer.run(torch.randn(3, 19, 3), None, None, return_sequences=return_sequences)
    assert written[0].shape == (3, 19, 5)
    assert written[1] is None
