"""Layers of all kinds, and their comparison with the naive loop: outputs, states, every gradient."""

import torch
from torch import nn

from lmu_hf.model import lookahead, plan, recurrent_scan, relaxed, scan
from lmu_hf.model.layer import LMU

F64 = torch.float64
CELLS = {
    "rnn": {"hidden_cell": "rnn", "hidden_size": 5},
    "rnn_no_bias": {"hidden_cell": {"name": "rnn", "use_bias": False}, "hidden_size": 5},
    "relu": {"hidden_cell": "rnn", "hidden_size": 5, "hidden_act": "relu"},
    "sigmoid": {"hidden_cell": "rnn", "hidden_size": 5, "hidden_act": "sigmoid"},
    "lstm": {"hidden_cell": "lstm", "hidden_size": 5},
    "gru": {"hidden_cell": "gru", "hidden_size": 5},
    "dense": {"hidden_cell": "dense", "hidden_size": 5, "hidden_act": "tanh"},
    "torch_rnn": {"hidden_cell": nn.RNNCell},
    "torch_lstm": {"hidden_cell": nn.LSTMCell},
    "torch_gru": {"hidden_cell": nn.GRUCell},
    "torch_linear": {"hidden_cell": nn.Linear},
}
CONNECTIONS = {
    "h2m": {"hidden_to_memory": True},
    "all": {"hidden_to_memory": True, "memory_to_memory": True, "input_to_hidden": True, "use_bias": True},
    "m2m": {"memory_to_memory": True, "input_to_hidden": True},
    "no_kernel": {"hidden_to_memory": True, "memory_to_memory": True, "kernel_initializer": None, "memory_d": 8},
}
SYSTEMS = {
    "one": {"theta": 9.0},
    "scales": {"theta": [5.0, 20.0]},
    "trained": {"theta": [5.0, 20.0], "trainable_theta": True},
}


def build(cell, connections, system):
    arguments = {"memory_d": 2, "order": 4, **CELLS[cell], **CONNECTIONS[connections], **SYSTEMS[system]}
    if isinstance(arguments["theta"], list):
        arguments["theta"] = (arguments["theta"] * 4)[: arguments["memory_d"]]
    if isinstance(arguments["hidden_cell"], type):
        features = arguments["memory_d"] * 4 + 3 * bool(arguments.get("input_to_hidden"))
        arguments["hidden_cell"] = arguments["hidden_cell"](features, 5, dtype=F64)
    layer = LMU(3, return_state=True, return_sequences=True, dtype=F64, **arguments)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.endswith("theta_inv"):
                parameter.uniform_(-0.6, 0.6)
    return layer


def take(monkeypatch, chunk, memory="lookahead"):
    """Makes every layer run in chunks of this size."""
    monkeypatch.setattr(lookahead, "lookahead_chunk", lambda *_, **__: chunk)
    for_itself = plan.recurrence_algorithm

    def chosen(*sizes, **feedback):
        # With memory_to_memory alone the look-ahead comes first, and what follows is chosen by cost.
        ours = feedback["hidden_to_memory"] or memory != "lookahead"
        return (memory, chunk) if ours else for_itself(*sizes, **feedback)

    monkeypatch.setattr(plan, "recurrence_algorithm", chosen)


def as_if_large(monkeypatch):
    """Makes every matrix pass for one whose inputs and gradients BLAS takes, not the compiled loops."""
    for module in (recurrent_scan, relaxed, scan):
        monkeypatch.setattr(module, "MOST_NUMBERS", 0)


def everything(layer, x, lengths, at_rest=False):
    """Output, states, and the gradients of x, of the initial state if it is not left out, and of all weights; always with the
    same dropout."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    zeros = () if at_rest else layer.cell.initial_state(x).tensors()
    start = tuple(torch.randn_like(part).requires_grad_() for part in zeros)
    output, state = layer(x, start or None, lengths=lengths)
    results = [output, *state.tensors()]
    loss = sum((result * torch.randn(result.shape, dtype=F64)).sum() for result in results)
    # A state that a path does not depend on has no gradient there and a zero one elsewhere.
    inputs = [x, *start, *layer.parameters()]
    return results, torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def assert_equals_naive(layer, algorithm, cases, *, of_results=1e-11, batch=4, at_rest=False):
    """Compares everything for some numbers of steps, each with the lengths of its rows or None."""
    for steps, lengths in cases.items():
        x = torch.randn(batch, steps, 3, dtype=F64)
        lengths = None if lengths is None else torch.tensor(lengths)
        layer.algorithm = algorithm
        results, gradients = everything(layer, x, lengths, at_rest)
        layer.algorithm = "naive"
        naive_results, naive_gradients = everything(layer, x, lengths, at_rest)
        # A linear cell without squashing may grow to 1e3 in 23 steps: relative to that.
        for ours, naive in zip(results, naive_results, strict=True):
            assert (ours - naive).abs().max() < of_results * max(1.0, float(naive.detach().abs().max()))
        for ours, naive in zip(gradients, naive_gradients, strict=True):
            assert (ours - naive).abs().max() < 1e-11 * max(1.0, float(naive.abs().max()))
