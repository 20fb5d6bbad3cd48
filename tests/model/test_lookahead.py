"""The coupled recurrence in chunks and merged, against the naive loops: outputs, states, every gradient."""

import gc

import pytest
import torch
from against_naive import CELLS, CONNECTIONS, F64, SYSTEMS, as_if_large, assert_equals_naive, build, take
from torch import nn

from lmu_hf.model import scan
from lmu_hf.model.compiled import available
from lmu_hf.model.gates import GATES, Pointwise, gate_weights
from lmu_hf.model.layer import LMU


def needs_compiled(memory):
    if memory == "relaxed" and not available(torch.zeros(0)):
        pytest.skip("no compiled loop")


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


@pytest.mark.parametrize("memory", ["lookahead", "folded", "written", "convolved"])
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("cell", ["rnn", "lstm", "torch_gru"])
def test_large_matrices(cell, system, memory, loop, monkeypatch):
    take(monkeypatch, 4, memory)
    as_if_large(monkeypatch)
    monkeypatch.setitem(CONNECTIONS, "none", {"input_to_hidden": True})
    layer = build(cell, "all" if memory == "lookahead" else "none", system)
    assert_equals_naive(layer, "auto", {2: None, 39: [39, 16, 17, 0]}, at_rest=memory == "convolved")


def test_order_256_in_float32(loop):
    layer = LMU(1, 1, 256, 784.0, "rnn", 20, hidden_to_memory=True, memory_to_memory=True, return_sequences=True)
    layer.algorithm = "lookahead"  # "auto" has other ways, with tests of their own
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


@pytest.mark.parametrize(("connections", "memory"), [("all", "lookahead"), ("all", "relaxed"), ("none", "convolved")])
def test_second_derivative_is_refused(connections, memory, monkeypatch):
    needs_compiled(memory)
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


@pytest.mark.parametrize("system", ["one", "scales"])
@pytest.mark.parametrize("connections", ["h2m", "all", "none"])
def test_merged_with_large_parts(connections, system, compiled_loop):
    """Parts of the matrix that are copied and multiplied in other ways than small ones."""
    torch.manual_seed(2)
    options = {**CONNECTIONS.get(connections, {}), **SYSTEMS[system]}
    layer = LMU(3, 2, 33, hidden_cell="lstm", hidden_size=70, return_state=True, return_sequences=True, dtype=F64, **options)
    assert_equals_naive(layer, "merged", {5: None})


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


@pytest.mark.parametrize("return_sequences", [False, True])
@pytest.mark.parametrize(
    ("connections", "memory"),
    [("all", "lookahead"), ("all", "relaxed"), ("none", "folded"), ("none", "written"), ("none", "convolved")],
)
def test_no_state_where_none_is_wanted(connections, memory, return_sequences, monkeypatch):
    needs_compiled(memory)
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


@pytest.mark.parametrize(
    ("connections", "memory"),
    [
        ("all", "lookahead"),
        ("all", "relaxed"),
        ("all", "merged"),
        ("none", "folded"),
        ("none", "written"),
        ("none", "convolved"),
    ],
)
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_without_a_backward_pass(cell, connections, memory, loop, monkeypatch):
    """Nothing is kept for it, and nothing else changes."""
    needs_compiled(memory)
    take(monkeypatch, 4, memory)
    monkeypatch.setitem(CONNECTIONS, "none", {})
    layer = build(cell, connections, "scales")
    x, lengths = torch.randn(3, 9, 3, dtype=F64), torch.tensor([9, 4, 0])
    output, state = layer(x, lengths=lengths)
    with torch.no_grad():
        alone, own = layer(x, lengths=lengths)
    assert output.requires_grad
    for one, other in zip((output, *state.tensors()), (alone, *own.tensors()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_room_without_a_backward_pass(kind, loop):
    states = tuple(torch.zeros(2, 5) for _ in range(1 + (kind == "lstm")))
    kept = Pointwise(kind).allocate(states, 100, backward=False)
    needed = [part.untyped_storage().nbytes() for part in kept[len(states) :]]
    assert needed == [2 * 20 * 4 * (100 if loop == "python" else 1)]
    assert all(part.shape == (2, 100, 5) and part.is_contiguous() for part in kept[: len(states)])


@pytest.mark.parametrize(
    ("connections", "memory"), [("all", "lookahead"), ("all", "relaxed"), ("all", "merged"), ("none", "folded")]
)
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_a_gradient_of_one_result_alone(cell, connections, memory, loop, monkeypatch):
    """Nothing then reaches the sequences of the others."""
    needs_compiled(memory)
    take(monkeypatch, 4, memory)
    monkeypatch.setitem(CONNECTIONS, "none", {"input_to_hidden": True})
    layer, x = build(cell, connections, "scales"), torch.randn(4, 23, 3, dtype=F64, requires_grad=True)
    zeros = () if memory == "relaxed" else layer.cell.initial_state(x).tensors()  # that one begins at rest
    start = tuple(torch.randn_like(part).requires_grad_() for part in zeros)
    inputs = [x, *start, *layer.parameters()]

    def gradients(algorithm):
        layer.algorithm = algorithm
        output, state = layer(x, start or None)
        for result in (output, *state.tensors()):
            yield torch.autograd.grad(
                result.square().sum(), inputs, retain_graph=True, allow_unused=True, materialize_grads=True
            )

    for ours, naive in zip(gradients("auto"), gradients("naive"), strict=True):
        for one, other in zip(ours, naive, strict=True):
            assert (one - other).abs().max() < 1e-11 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("trained", [(), ("kernel",), ("weight_hh",), ("bias", "weight_ih"), ("recurrent_kernel",)])
@pytest.mark.parametrize("memory", ["lookahead", "relaxed", "merged"])
def test_frozen_weights(memory, trained, loop, monkeypatch):
    """Gradients of x and of some weights alone."""
    needs_compiled(memory)
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
