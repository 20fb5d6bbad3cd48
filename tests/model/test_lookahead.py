"""The coupled recurrence in chunks, and the gated scan, against the naive loops: outputs, states, every gradient."""

import gc

import pytest
import torch
from torch import nn

from lmu_hf.model import chunked_scan, convolved, lookahead, plan, scan, time_loop
from lmu_hf.model.cell_registry import build_hidden_cell
from lmu_hf.model.gates import GATES, gate_weights
from lmu_hf.model.layer import LMU
from lmu_hf.model.recurrence import naive_scan

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


@pytest.mark.parametrize("connections", CONNECTIONS)
@pytest.mark.parametrize("cell", ["rnn", "gru"])
@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_no_longer_than_the_memory_has_dimensions(chunk, cell, connections, loop, monkeypatch):
    test_equals_naive(cell, connections, "scales", chunk, loop, monkeypatch)


# One of the lengths below is whole chunks of 4, none of 7.
@pytest.mark.parametrize(("system", "chunk"), [("one", 7), ("scales", 4), ("trained", 7)])
@pytest.mark.parametrize("connections", CONNECTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_equals_naive(cell, connections, system, chunk, loop, monkeypatch):
    take(monkeypatch, chunk)
    layer = build(cell, connections, system)
    assert_equals_naive(layer, "lookahead", {2: None, 16: None, 23: [23, 7, 8, 0]}, of_results=1e-12)


ENCODINGS = {
    "act": {"encoder_act": "tanh"},
    "dropout": {"dropout": 0.4},
    "both": {"encoder_act": "sigmoid", "dropout": 0.4},
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("system", ["one", "trained"])
@pytest.mark.parametrize("connections", CONNECTIONS)
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru", "dense"])
def test_encodings(cell, connections, system, encoding, loop, monkeypatch):
    """u is no linear function of the state, or not the same one in each row."""
    take(monkeypatch, 4)
    monkeypatch.setitem(CONNECTIONS, "encoded", {**CONNECTIONS[connections], **ENCODINGS[encoding]})
    layer = build(cell, "encoded", system)
    assert_equals_naive(layer, "lookahead", {2: None, 8: None, 23: [23, 7, 8, 0]})


def test_order_256_in_float32():
    layer = LMU(1, 1, 256, 784.0, "rnn", 20, hidden_to_memory=True, memory_to_memory=True, return_sequences=True)
    x = torch.rand(2, 784, 1)
    output = layer(x)
    layer.algorithm = "naive"
    naive = layer(x)
    exact = layer.double()(x.double())
    # As exact as the naive loop in float32, whose rounding through 784 coupled steps is 1e-5 to 3e-5 here.
    error, naive_error = float((output - exact).detach().norm()), float((naive - exact).detach().norm())
    assert error < 2 * naive_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    layer = build("lstm", "all", "one").float()
    x = torch.randn(3, 20, 3)
    expected, _ = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        output, state = layer(x)
    assert state.memory.dtype == torch.float32
    # Everything but the decoders of x runs in float32 here.
    assert (output.float() - expected).abs().max() < 0.02


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"encoder_act": "gelu"}, "encoder_act"),
        ({"recurrent_dropout": 0.5}, "dropout"),
        ({"hidden_act": "gelu"}, "no form as affine gates"),
    ],
)
def test_what_it_cannot_do(arguments, reason):
    kwargs = {"hidden_to_memory": True, "memory_to_memory": True, **arguments}
    layer = LMU(3, 2, 4, 9.0, "rnn", 5, algorithm="lookahead", **kwargs)
    x = torch.randn(2, 6, 3)
    with pytest.raises(ValueError, match=f"'lookahead' cannot run this layer, because .*{reason}"):
        layer(x)
    layer.algorithm = "auto"
    assert layer(x).isfinite().all()


@pytest.mark.parametrize(("connections", "memory"), [("all", "lookahead"), ("none", "convolved")])
def test_second_derivative_is_refused(connections, memory, monkeypatch):
    take(monkeypatch, 4, memory)
    monkeypatch.setitem(CONNECTIONS, "none", {})
    layer = build("rnn", connections, "one")
    x = torch.randn(2, 6, 3, dtype=F64, requires_grad=True)
    output, _ = layer(x)
    with pytest.raises(RuntimeError, match="second derivative.*algorithm='naive'"):
        torch.autograd.grad(output.sum(), x, create_graph=True)
    layer.algorithm = "naive"
    (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    gradient.sum().backward()


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_gated_scan(kind):
    cell = build_hidden_cell(
        kind, memory_d=2, order=3, input_size=1, input_to_hidden=False, hidden_size=4, hidden_act=None, dtype=F64
    )
    z = torch.randn(3, 11, 6, dtype=F64, requires_grad=True)
    state = tuple(torch.randn(3, size, dtype=F64, requires_grad=True) for size in cell.state_sizes)
    lengths = torch.tensor([11, 4, 0])
    sides = []
    weights = gate_weights(cell)
    for naive in (False, True):
        if naive:
            output, final = naive_scan(cell, z, state, lengths, return_sequence=True)
        else:
            base = z @ weights.input_weight + weights.bias
            output, final = lookahead.gated_scan(weights, base, state, lengths, return_sequence=True)
        loss = output.square().sum() + sum((part * 1.5).sum() for part in final)
        sides.append([output, *final, *torch.autograd.grad(loss, [z, *state, *cell.parameters()])])
    for ours, naive in zip(*sides, strict=True):
        assert (ours - naive).abs().max() < 1e-12


MERGED = {**CONNECTIONS, "uncoupled": {}, "i2h": {"input_to_hidden": True, "use_bias": True}, "act": {"encoder_act": "tanh"}}


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("connections", MERGED)
# torch's own cells differ in their weights only.
@pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell.startswith("torch") or cell == "torch_gru"])
def test_merged(cell, connections, system, loop, monkeypatch):
    if cell == "dense" and not MERGED[connections].get("hidden_to_memory"):
        pytest.skip("nothing goes step by step")
    monkeypatch.setitem(CONNECTIONS, connections, MERGED[connections])
    layer = build(cell, connections, system)
    assert_equals_naive(layer, "merged", {2: None, 16: None, 23: [23, 7, 8, 0]})


@pytest.mark.parametrize(
    "options", [{"encoder_act": "tanh"}, {"dropout": 0.5}, {}, {"memory_to_memory": True, "dropout": 0.5}]
)
@pytest.mark.parametrize("algorithm", ["merged", "auto"])
def test_half_precision_steps_of_a_layer_before(algorithm, options, loop):
    layer = LMU(3, 2, 4, 9.0, "gru", 5, algorithm=algorithm, return_sequences=True, **options)
    x = torch.randn(4, 9, 3)
    torch.manual_seed(0)
    expected = layer(x.bfloat16().float())
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x.bfloat16())
        # Called inside too, where what runs backwards must not round either.
        found = torch.autograd.grad(output.float().sum(), list(layer.parameters()))
    exact = torch.autograd.grad(expected.sum(), list(layer.parameters()))
    assert (output.float() - expected).abs().max() < 0.02
    for ours, theirs in zip(found, exact, strict=True):
        assert (ours - theirs).abs().max() < 0.03 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("algorithm", ["merged", "lookahead"])
def test_a_single_step(algorithm):
    layer = LMU(3, 2, 4, 9.0, "gru", 5, algorithm=algorithm, hidden_to_memory=True, dtype=F64)
    x = torch.randn(2, 9, 3, dtype=F64)
    exact = layer(x)
    layer.checkpoint_steps = 4  # the last segment is one step
    assert (layer(x) - exact).abs().max() < 1e-12
    assert layer.explain(2, 1).memory == algorithm
    step = layer(x[:, :1])
    layer.algorithm = "naive"
    assert (layer(x[:, :1]) - step).abs().max() < 1e-12


def test_an_infinite_hidden_state_stays_out_of_the_memory():
    layer = LMU(1, 1, 4, 9.0, "rnn", 5, hidden_act="relu", return_state=True)
    with torch.no_grad():
        layer.cell.hidden_cell.weight_hh.copy_(1e9 * torch.eye(5))
        layer.cell.hidden_cell.weight_ih.fill_(1.0)
    output, state = layer(torch.rand(2, 50, 1))
    assert not output.isfinite().all()
    assert state.memory.isfinite().all()


def test_merged_last_output_and_dropout():
    layer = LMU(3, 2, 4, 9.0, "lstm", 5, input_to_hidden=True, dropout=0.5, return_state=True, dtype=F64)
    x, lengths = torch.randn(4, 9, 3, dtype=F64), torch.tensor([9, 3, 0, 1])
    found = []
    for layer.algorithm in ("merged", "naive"):
        torch.manual_seed(0)
        output, state = layer(x, lengths=lengths)
        found.append([output, *state.tensors()])
    for ours, naive in zip(*found, strict=True):
        assert (ours - naive).abs().max() < 1e-12


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru", "torch_gru"])
@pytest.mark.parametrize("input_to_hidden", [False, True])
@pytest.mark.parametrize("folds", [False, True])
def test_uncoupled(cell, system, input_to_hidden, folds, loop, monkeypatch):
    take(monkeypatch, 16, "folded" if folds else "written")
    monkeypatch.setitem(CONNECTIONS, "none", {"input_to_hidden": input_to_hidden})
    layer = build(cell, "none", system)
    assert_equals_naive(layer, "auto", {2: None, 16: None, 39: [39, 16, 17, 0]})


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("cell", [*CELLS])
@pytest.mark.parametrize("connections", ["none", "i2h", "m2m"])
def test_convolved(cell, system, connections, loop, monkeypatch):
    if cell in ("dense", "torch_linear"):
        pytest.skip("nothing goes step by step")
    take(monkeypatch, 0, "convolved")
    monkeypatch.setattr(lookahead, "lookahead_chunk", lambda *_, **__: 4)
    for name in ("_ROWS", "_FEW_ROWS", "_NUMBERS"):
        monkeypatch.setattr(convolved, name, 1)  # several rounds
    monkeypatch.setitem(CONNECTIONS, "none", {})
    monkeypatch.setitem(CONNECTIONS, "i2h", {"input_to_hidden": True, "use_bias": True, "dropout": 0.3})
    layer = build(cell, connections, system)
    assert layer.explain(4, 39).memory == "convolved"
    assert_equals_naive(layer, "auto", {2: None, 16: None, 39: [39, 16, 17, 0, 5]}, batch=5, at_rest=True)


def test_convolved_rows_are_not_touched_by_what_is_not_finite(monkeypatch):
    take(monkeypatch, 0, "convolved")
    layer = LMU(3, 2, 4, 9.0, "gru", 5, return_sequences=True)
    x = torch.randn(4, 11, 3)
    exact = layer(x)
    x[1, 5] = float("nan")
    # Its partner in a transform is another one, and rounds otherwise.
    assert (layer(x) - exact)[[0, 2, 3]].abs().max() < 1e-6


@pytest.mark.parametrize("return_sequences", [False, True])
@pytest.mark.parametrize(
    ("connections", "memory"), [("all", "lookahead"), ("none", "folded"), ("none", "written"), ("none", "convolved")]
)
def test_no_state_where_none_is_wanted(connections, memory, return_sequences, monkeypatch):
    take(monkeypatch, 4, memory)
    monkeypatch.setitem(CONNECTIONS, "none", {})
    layer = build("lstm", connections, "one")
    x, lengths = torch.randn(3, 9, layer.cell.input_size, dtype=torch.float64), torch.tensor([9, 4, 0])
    results = []
    for wanted in (True, False):
        output, state = layer.run(x, None, lengths, return_sequences=return_sequences, return_state=wanted)
        assert (state is not None) == wanted
        results.append([output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    layer.stateful, layer.return_state = True, False
    layer(x)
    assert layer._state is not None


@pytest.mark.parametrize(("connections", "memory"), [("all", "lookahead"), ("all", "merged"), ("none", "folded")])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_a_gradient_of_one_result_alone(cell, connections, memory, loop, monkeypatch):
    """Nothing then reaches the sequences of the others."""
    take(monkeypatch, 4, memory)
    monkeypatch.setitem(CONNECTIONS, "none", {"input_to_hidden": True})
    layer, x = build(cell, connections, "scales"), torch.randn(4, 11, 3, dtype=F64)
    start = tuple(torch.randn_like(part).requires_grad_() for part in layer.cell.initial_state(x).tensors())
    inputs = [*start, *layer.parameters()]

    def gradients(algorithm):
        layer.algorithm = algorithm
        output, state = layer(x, start)
        for result in (output, *state.tensors()):
            yield torch.autograd.grad(
                result.square().sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True
            )

    for ours, naive in zip(gradients("auto"), gradients("naive"), strict=True):
        for one, other in zip(ours, naive, strict=True):
            assert (one - other).abs().max() < 1e-11 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("trained", [(), ("kernel",), ("weight_hh",), ("bias", "weight_ih"), ("recurrent_kernel",)])
@pytest.mark.parametrize("memory", ["lookahead", "merged"])
def test_frozen_weights(memory, trained, loop, monkeypatch):
    """Gradients of x and of some weights alone."""
    take(monkeypatch, 4, memory)
    layer, x = build("gru", "all", "scales"), torch.randn(4, 11, 3, dtype=F64, requires_grad=True)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] in trained)
    inputs = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    assert len(inputs) >= len(trained)
    found = []
    for layer.algorithm in ("auto", "naive"):
        output, state = layer(x)
        loss = output.square().sum() + state.memory.square().sum()
        found.append(torch.autograd.grad(loss, [x, *inputs], retain_graph=True))
        found.append(torch.autograd.grad(loss, inputs or [x]))
    for ours, naive in zip(sum(found[:2], ()), sum(found[2:], ()), strict=True):
        assert (ours - naive).abs().max() < 1e-11 * max(1.0, float(naive.abs().max()))


@pytest.mark.parametrize(("batch", "shared"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("encoder_act", ["linear", "tanh"])
def test_few_rows(cell, system, encoder_act, batch, shared, loop, monkeypatch):
    """Whose products with the fold are the loop's own, shared by all threads, unless they cost less than sharing them."""
    take(monkeypatch, 8)
    if shared:
        monkeypatch.setattr(scan, "_SHARED", 0)
    monkeypatch.setitem(CONNECTIONS, "some", {**CONNECTIONS["all"], "encoder_act": encoder_act})
    layer = build(cell, "some", system)
    assert_equals_naive(layer, "auto", {2: None, 37: [37, 30][:batch]}, batch=batch)


@pytest.mark.parametrize("batch", [5, 130])
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_many_rows(cell, system, batch, loop, monkeypatch):
    """Fewer than threads, which then share the products with the memory; and more than go through the steps together."""
    take(monkeypatch, 8)
    if batch == 5:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    layer = build(cell, "all", system)
    lengths = torch.arange(batch) * 37 // (batch - 1)
    assert_equals_naive(layer, "auto", {2: None, 37: lengths.tolist()}, batch=batch)


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("rows", [12, 1000])
def test_uncoupled_as_on_cuda(system, folds, rows, monkeypatch):
    """The memory at the start of all chunks at once, in several segments and in one."""
    take(monkeypatch, 2, "folded" if folds else "written")
    monkeypatch.setattr(time_loop, "starts_at_once", lambda like: True)
    monkeypatch.setattr(chunked_scan, "_ROWS", rows)
    monkeypatch.setitem(CONNECTIONS, "none", {"input_to_hidden": True})
    layer = build("rnn", "none", system)
    assert_equals_naive(layer, "auto", {2: None, 16: None, 39: [39, 16, 17, 0]})


def test_no_graph_is_kept_alive():
    def graphs():
        return sum(type(item).__name__ == "_RecurrentScanBackward" for item in gc.get_objects())

    layer = build("lstm", "all", "one")
    gc.collect()
    gc.disable()
    try:
        output = layer(torch.randn(2, 6, 3, dtype=F64))
        assert graphs() == 1
        del output
        # Freed by counting references, without the collector: the graph holds no cycle.
        assert graphs() == 0
    finally:
        gc.enable()


def test_a_subclass_is_not_taken_for_its_parent():
    class Doubled(nn.RNNCell):
        def forward(self, *arguments):
            return 2 * super().forward(*arguments)

    layer = LMU(3, 2, 4, 9.0, Doubled(8, 5), return_sequences=True)
    x = torch.randn(2, 6, 3)
    output = layer(x)
    layer.algorithm = "naive"
    assert (output - layer(x)).abs().max() < 1e-6


def test_every_kind_has_weights():
    assert {"tanh", "sigmoid", "relu", "linear", "lstm", "gru"} == set(GATES)
    assert gate_weights(nn.Sequential()) is None
