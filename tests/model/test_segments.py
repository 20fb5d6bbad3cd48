"""Training segment by segment: equal to one piece in everything, with one segment's activations at a time."""

import pytest
import torch
from test_layer import CONFIGS, F64, build, distance, flat

from lmu_hf.model import layer as layer_module
from lmu_hf.model.layer import LMU


def run(layer, x, state, lengths, seed=0):
    """Output, state and all gradients."""
    torch.manual_seed(seed)  # of the dropout masks
    layer.zero_grad()
    x = x.clone().requires_grad_()
    output, final = layer(x, state, lengths=lengths)
    (output.square().sum() + sum((tensor**2).sum() for tensor in flat(final))).backward()
    return output, final, [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sequences", [False, True])
def test_segments_change_nothing(name, sequences):
    """With rows that end before, at and after the ends of segments, an initial state and dropout."""
    rates = {"dropout": 0.3, "recurrent_dropout": 0.3 if "m2m" in name or name == "rnn_all" else 0.0}
    layer = build(name, return_sequences=sequences, **rates).train()
    x, lengths = torch.randn(6, 23, 3, dtype=F64), torch.tensor([23, 7, 8, 0, 15, 14])
    _, state = layer(torch.randn(6, 4, 3, dtype=F64))
    state = type(state).of(tuple(tensor.detach() for tensor in state.tensors()))
    for own in (lengths, None):
        layer.checkpoint_steps = None
        output, final, grads = run(layer, x, state, own)
        for steps in (1, 7, 22, 23, 24):
            layer.checkpoint_steps = steps
            other_output, other_final, other_grads = run(layer, x, state, own)
            # Rounding of float64 through 27 steps.
            assert (output - other_output).abs().max() < 1e-12
            assert distance(final, other_final) < 1e-12
            assert len(grads) == len(other_grads)
            for one, other in zip(grads, other_grads, strict=True):
                assert (one - other).abs().max() < 1e-10 * max(1.0, float(one.abs().max()))


def test_both_directions():
    layer = build("rnn", bidirectional=True)
    x, lengths = torch.randn(2, 23, 3, dtype=F64), torch.tensor([23, 9])
    whole = run(layer, x, None, lengths)
    layer.checkpoint_steps = 5
    parts = run(layer, x, None, lengths)
    assert (whole[0] - parts[0]).abs().max() < 1e-12
    assert all((one - other).abs().max() < 1e-10 for one, other in zip(whole[2], parts[2], strict=True))


def saved_numbers(layer, x):
    """Numbers that the graph of a call holds on to, weights and inputs aside."""
    held, own = {}, {p.untyped_storage().data_ptr() for p in [x, *layer.parameters()]}

    def hold(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor.detach()  # an output that its own graph holds would never be freed

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        output = layer(x)
    total = sum(held.values())
    del output
    return total


@pytest.mark.parametrize("name", ["rnn_all", "rnn", "lstm"])
def test_what_is_kept_does_not_grow_with_the_steps_of_a_segment(name):
    layer = build(name, return_state=False)
    x = torch.randn(2, 512, 3, dtype=F64)
    whole = saved_numbers(layer, x)
    layer.checkpoint_steps = 128
    # Four states are a few dozen numbers.
    assert saved_numbers(layer, x) < whole / 8


def test_without_gradients_nothing_is_cut(monkeypatch):
    layer = build("rnn", checkpoint_steps=4)
    monkeypatch.setattr("lmu_hf.model.layer.in_segments", None)
    with torch.no_grad():
        layer(torch.randn(2, 23, 3, dtype=F64))


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "4"])
def test_wrong_numbers_of_steps(steps):
    with pytest.raises(ValueError, match=r"checkpoint_steps: expected a whole number of time steps >= 1 or None, found"):
        LMU(1, 1, 4, 10.0, checkpoint_steps=steps)


def test_the_plan_is_that_of_a_segment():
    layer = build("memory", return_sequences=True, return_state=False)
    whole = layer.explain(2, 5000, training=True)
    layer.checkpoint_steps = 8
    assert layer.explain(2, 5000, training=True) == layer.explain(2, 8, training=True)
    assert layer.explain(2, 5000, training=False) == whole._replace(chunk=layer.explain(2, 5000, training=False).chunk)


@pytest.mark.usefixtures("compiled_loop")
def test_a_segment_does_not_begin_at_rest(monkeypatch):
    """So ways that ask for an empty memory are neither taken nor promised."""
    layer = LMU(1, 1, 256, 784.0, "rnn", 212, hidden_to_memory=True, return_sequences=True)
    layer.checkpoint_steps = 100
    assert layer.explain(3, 100, training=True).memory == "relaxed"
    plans, make_plan = [], layer_module.make_plan
    monkeypatch.setattr(layer_module, "make_plan", lambda *a, **k: plans.append(make_plan(*a, **k)) or plans[-1])
    promised = layer.explain(3, 300, training=True)
    layer(torch.randn(3, 300, 1))
    assert promised.memory != "relaxed"
    assert plans == [promised] * 4


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sequences", [False, True])
def test_a_state_keeps_nothing_else_alive(name, sequences, loop):
    """Somebody who carries a state from call to call holds its numbers, not the sequence that it is the end of."""
    layer = build(name, return_sequences=sequences)
    for lengths in (None, torch.tensor([40, 0, 17])):
        output, state = layer(torch.randn(3, 40, 3, dtype=F64), lengths=lengths)
        for tensor in [*state.tensors(), *([] if sequences else [output])]:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
