"""The recurrence without memory, by segments and in the loop that reads its inputs, against plain steps under autograd."""

import gc

import pytest
import torch

import lmu_hf.native
from lmu_hf.model import recurrent_scan as module
from lmu_hf.model.gates import GATES, Pointwise
from lmu_hf.model.layer_costs import Recurrence, _sharing
from lmu_hf.model.ragged import Trajectory
from lmu_hf.model.recurrent_scan import recurrent_scan

F32, F64 = torch.float32, torch.float64
WAYS = ["python", "segments", "reads"]


def naive_step(kind, gates, states):
    """What a cell makes of its gates, in plain operations."""
    hidden = states[0]
    if kind == "lstm":
        i, f, g, o = gates.chunk(4, dim=1)
        cell = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell
    if kind == "gru":
        r, z, x, h = gates.chunk(4, dim=1)
        new = (x + r.sigmoid() * h).tanh()
        return (new + z.sigmoid() * (hidden - new),)
    return ({"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu, "linear": torch.clone}[kind](gates),)


def naive_recurrent_scan(cell, given, matrix, states, *, constant=False, alone=True):
    kept = []
    size = states[0].shape[1]
    for x in given.unbind(1):
        row = [states[0]]
        known = 0.0
        if len(matrix) - constant > size:
            row.append(x)
        else:
            known = x
        if constant:
            row.append(torch.ones_like(x[:, :1]))
        sums = torch.cat(row, dim=1) @ matrix + known
        memory, gates = sums.tensor_split([cell.linear], dim=1)
        after = naive_step(cell.kind, gates, (states[0][:, cell.linear :], *states[1:]))
        states = (torch.cat([memory, after[0]], dim=1), *after[1:])
        kept.append(states)
    results = tuple(torch.stack(parts, dim=1) for parts in zip(*kept, strict=True))
    each = (*results, results[0][..., cell.linear :]) if cell.linear and alone else results
    return Trajectory(each, states)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """The loop in Python and the compiled one, both by segments, and the compiled one that reads inputs."""
    request.getfixturevalue("python_loop" if request.param == "python" else "compiled_loop")
    if request.param != "reads":
        monkeypatch.setattr(module, "MOST_NUMBERS", 0)
        monkeypatch.setattr(module, "_ROWS", 1)  # segments of 16 steps
    return request.param


def build(kind, linear, size, inputs, batch, steps, *, constant=True, dtype=F64, factor=0.6):
    torch.manual_seed(0)
    gates = {"lstm": 4, "gru": 4}.get(kind, 1) * size
    states = [torch.randn(batch, linear + size, dtype=dtype)]
    if kind == "lstm":
        states.append(torch.randn(batch, size, dtype=dtype))
    rows = linear + size + inputs + constant
    matrix = torch.randn(rows, linear + gates, dtype=dtype) * factor / rows**0.5
    given = torch.randn(batch, steps, inputs or linear + gates, dtype=dtype)
    return [given, matrix, *states]


def everything(scan, kind, linear, tensors, *, constant=True, wanted=None, **options):
    """The results, and the gradients of the tensors that are wanted."""
    leaves = [tensor.detach().requires_grad_(wanted is None or i in wanted) for i, tensor in enumerate(tensors)]
    given, matrix, *states = leaves
    ran = scan(Pointwise(kind, linear), given, matrix, tuple(states), constant=constant, **options)
    results = [*ran.each, *ran.last]
    torch.manual_seed(1)
    loss = sum((part * torch.randn(part.shape, dtype=F64)).sum() for part in results)
    return [*results, *torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])]


def assert_equal(kind, linear, tensors, tolerance=1e-11, **options):
    ours = everything(recurrent_scan, kind, linear, tensors, **options)
    exact = everything(naive_recurrent_scan, kind, linear, [tensor.double() for tensor in tensors], **options)
    assert len(ours) == len(exact)
    for one, other in zip(ours, exact, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * max(1.0, float(other.detach().abs().max()))


# linear, hidden size, inputs, batch, steps
SIZES = [(0, 1, 1, 1, 1), (6, 5, 3, 3, 23), (1, 2, 2, 2, 17), (0, 17, 0, 5, 37), (9, 8, 33, 2, 40), (3, 4, 1, 131, 5)]


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", GATES)
def test_equals_naive(kind, sizes, constant, way):
    linear, size, inputs, batch, steps = sizes
    if constant and not inputs:
        pytest.skip("what is given includes it")
    tensors = build(kind, linear, size, inputs, batch, steps, constant=constant)
    assert_equal(kind, linear, tensors, constant=constant)


@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_float32(kind, way):
    # Long enough for rows to be multiplied more than once before the end.
    assert_equal(kind, 12, build(kind, 12, 11, 5, 70, 41, dtype=F32), tolerance=1e-5)


@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {0, 1}, {1, 2, 3}])
def test_some_gradients_alone(wanted, way):
    assert_equal("lstm", 6, build("lstm", 6, 5, 3, 3, 23), wanted=wanted)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("layout", ["expanded", "time_major", "every_other", "channels", "rows"])
def test_layouts_of_the_inputs(layout, constant, way):
    given, matrix, *states = build("gru", 6, 5, 4, 3, 23, constant=constant)
    given = {
        "expanded": given[:1].expand(3, -1, -1),
        "time_major": given.transpose(0, 1).contiguous().transpose(0, 1),
        "every_other": given.repeat_interleave(2, dim=1)[:, ::2],
        "channels": given.mT.contiguous().mT,
        "rows": torch.cat([given, given], dim=2)[..., :4],
    }[layout]
    assert_equal("gru", 6, [given, matrix, *states], constant=constant)


@pytest.mark.parametrize("transposed", [False, True])
def test_layouts_of_the_matrix(transposed, way):
    given, matrix, *states = build("tanh", 6, 5, 4, 3, 23)
    matrix = matrix.mT.contiguous().mT if transposed else torch.cat([matrix, matrix], dim=1)[:, : matrix.shape[1]]
    assert_equal("tanh", 6, [given, matrix, *states])


@pytest.fixture(params=[2, 3, 5])
def threads(request, compiled_loop, set_threads):
    """Threads, of which as many share steps as there are processors."""
    set_threads(request.param)
    return request.param


# Few rows, and matrices and cells large enough for two threads and more.
SHARED = [(64, 100, 3, 1, 20), (5, 130, 40, 2, 17), (0, 67, 0, 1, 33), (0, 129, 5, 3, 16), (300, 17, 1, 2, 18)]


def shares(kind, sizes):
    linear, size, _, batch, steps = sizes
    gates = {"lstm": 4, "gru": 4}.get(kind, 1) * size
    run = Recurrence(batch, steps, 1, linear, size, gates)
    return _sharing(run, (linear + size) * (linear + gates), alone=False)


def test_some_share_and_some_do_not(set_threads):
    set_threads(5)
    assert [shares("tanh", sizes) for sizes in SHARED] == [3, 1, 1, 1, 2]
    assert [shares("lstm", sizes) for sizes in SHARED] == [5, 5, 2, 5, 2]


@pytest.mark.parametrize("way", ["segments", "reads"])
@pytest.mark.parametrize("sizes", SHARED)
@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_threads_share_the_steps_of_few_rows(kind, sizes, way, threads, monkeypatch):
    if way == "segments":
        monkeypatch.setattr(module, "MOST_NUMBERS", 0)
    linear, size, inputs, batch, steps = sizes
    for constant in (False, True)[: 1 + (inputs > 0)]:
        tensors = build(kind, linear, size, inputs, batch, steps, constant=constant)
        assert_equal(kind, linear, tensors, constant=constant)
    ran = recurrent_scan(Pointwise(kind, linear), *tensors[:2], tuple(tensors[2:]), constant=constant)
    again = everything(recurrent_scan, kind, linear, tensors, constant=constant)
    for one, other in zip((*ran.each, *ran.last), again, strict=False):
        assert torch.equal(one, other)


def test_threads_share_the_steps_of_more_rows_by_a_matrix_that_is_far_away(threads):
    sizes = (0, 730, 1, 5, 16)
    assert shares("lstm", sizes) == threads
    assert_equal("lstm", 0, build("lstm", *sizes))


@pytest.mark.parametrize("wanted", [{0}, {1}, {2}, {0, 1}, {1, 2, 3}])
def test_threads_share_some_gradients_alone(wanted, threads):
    tensors = build("lstm", *SHARED[1])
    tensors[1] = tensors[1].mT.contiguous().mT
    assert_equal("lstm", SHARED[1][0], tensors, wanted=wanted)


def test_a_gradient_of_one_result_alone(way):
    tensors = build("lstm", 6, 5, 3, 3, 23)
    for index in range(5):
        found = []
        for scan in (recurrent_scan, naive_recurrent_scan):
            given, matrix, *states = leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            ran = scan(Pointwise("lstm", 6), given, matrix, tuple(states), constant=True)
            found.append(torch.autograd.grad((*ran.each, *ran.last)[index].square().sum(), leaves))
        for ours, naive in zip(*found, strict=True):
            assert (ours - naive).abs().max() < 1e-11 * max(1.0, float(naive.abs().max()))


@pytest.mark.parametrize("kind", GATES)
def test_without_h_by_itself(kind, way):
    assert_equal(kind, 6, build(kind, 6, 5, 3, 3, 23), alone=False)


@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_what_is_not_finite_stays_in_its_row(kind, way):
    tensors = build(kind, 6, 5, 3, 5, 23)
    exact = recurrent_scan(Pointwise(kind, 6), *tensors[:2], tuple(tensors[2:]), constant=True).each
    tensors[0][3, 7, 1] = torch.nan
    given, matrix, *states = (tensor.requires_grad_() for tensor in tensors)
    found = recurrent_scan(Pointwise(kind, 6), given, matrix, tuple(states), constant=True).each
    others = [0, 1, 2, 4]
    for one, other in zip(found, exact, strict=True):
        assert torch.equal(one[others], other[others])
        assert torch.equal(one[3, :7], other[3, :7])
        assert not one[3, 7:].isfinite().any()
    (gradient,) = torch.autograd.grad(sum(part.square().sum() for part in found), given)
    assert gradient[others].isfinite().all()


@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
def test_runs_are_repeated_to_the_bit(kind, way):
    tensors = build(kind, 12, 11, 5, 70, 41, dtype=F32)
    first, second = (everything(recurrent_scan, kind, 12, tensors) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_the_second_derivative_is_refused(way):
    given, matrix, state = (tensor.requires_grad_() for tensor in build("tanh", 2, 3, 1, 2, 5))
    result, _ = recurrent_scan(Pointwise("tanh", 2), given, matrix, (state,), constant=True).each
    with pytest.raises(RuntimeError, match="second derivative.*algorithm='naive'"):
        torch.autograd.grad(result.sum(), matrix, create_graph=True)


def test_no_graph_is_kept_alive(way):
    def graphs():
        return sum(type(item).__name__ == "_RecurrentScanBackward" for item in gc.get_objects())

    given, matrix, *states = (tensor.requires_grad_() for tensor in build("lstm", 2, 3, 1, 2, 5))
    gc.collect()
    gc.disable()
    try:
        results = recurrent_scan(Pointwise("lstm", 2), given, matrix, tuple(states), constant=True)
        assert graphs() == 1
        del results
        # Freed by counting references, without the collector: the graph holds no cycle.
        assert graphs() == 0
    finally:
        gc.enable()


def test_large_matrices_are_left_to_blas(monkeypatch):
    read = []
    known_sums = module.known_sums
    monkeypatch.setattr(module, "known_sums", lambda *args: (read.append(len(args[1])), known_sums(*args))[1])
    for size in (10, 600):
        assert_equal("tanh", 4, build("tanh", 4, size, 3, 2, 5))
    assert read == ([3] if lmu_hf.native.why_not() is None else [3, 3])
