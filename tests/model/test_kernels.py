"""The Triton kernels against the naive scan, under Triton's interpreter, and compiled for GPUs that need not be there.

Triton decides whether it interprets once per process, and interpreting leaves its traces in it, so both happen in processes of
their own.
"""

import importlib.util
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from lmu_hf import LMU
from lmu_hf.model.chunked_scan import _Sizes
from lmu_hf.model.folding import ChunkOperators
from lmu_hf.model.gates import GATES, Pointwise
from lmu_hf.model.scan import NaiveScan, scan_class

TRITON = importlib.util.find_spec("triton") is not None
with_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed: pip install lmu-hf[gpu], Linux on x86_64 only")

# kind, batch, hidden size, D, C, T, rows per program. Without D the steps of two calls, as segments are. Every kind, every size
# below, the whole matrix in registers (few units, one row per program) and in tiles; not their product, which takes minutes.
CASES = [
    ("tanh", 1, 1, 1, 1, 3, 1),
    ("tanh", 3, 5, 2, 8, 19, 2),
    ("tanh", 17, 33, 1, 8, 11, 4),
    ("tanh", 3, 212, 1, 16, 17, 4),
    ("tanh", 3, 300, 0, 1, 3, 4),
    ("tanh", 2, 33, 0, 1, 6, 2),
    ("tanh", 2, 256, 0, 1, 5, 1),
    ("tanh", 2, 130, 1, 32, 40, 1),
    ("sigmoid", 2, 227, 2, 8, 10, 1),
    ("relu", 1, 60, 3, 40, 41, 1),
    ("linear", 2, 33, 0, 1, 6, 1),
    ("sigmoid", 3, 5, 3, 2, 7, 1),
    ("relu", 1, 33, 2, 8, 11, 1),
    ("linear", 17, 5, 3, 2, 5, 4),
    ("linear", 3, 0, 2, 8, 13, 2),
    ("linear", 2, 4, 70, 2, 3, 1),
    ("lstm", 3, 5, 1, 8, 11, 2),
    ("lstm", 17, 33, 0, 1, 4, 4),
    ("lstm", 1, 1, 3, 16, 9, 1),
    ("lstm", 2, 212, 0, 1, 3, 2),
    ("gru", 3, 5, 2, 8, 11, 2),
    ("gru", 17, 33, 0, 1, 4, 4),
    ("gru", 1, 1, 1, 2, 3, 1),
    ("gru", 2, 212, 0, 1, 3, 2),
]


def run(scan_of, kind, batch, size, dims, chunk, steps):
    """All that a scan computes, forwards and backwards, from the same numbers; what it should not touch is NaN before."""
    torch.manual_seed(0)
    states = tuple(torch.randn(batch, size) for _ in range(1 + (kind == "lstm")))
    width = dims + size * (4 if kind in ("lstm", "gru") else 1)
    step = torch.randn((chunk - 1) * dims * bool(dims) + size, width) * 0.5 / (size + dims) ** 0.5
    known = torch.randn(batch, steps, width)
    kept = tuple(tensor.fill_(torch.nan) for tensor in Pointwise(kind).allocate(states, steps))
    u = torch.full((batch, steps, dims), torch.nan)
    cuts = [(first, min(chunk, steps - first)) for first in range(0, steps, chunk)]
    if not dims:
        cuts = [(0, steps // 2), (steps // 2, steps - steps // 2)]
    scan = scan_of(Pointwise(kind), step, chunk, dims, states, kept)
    for first, count in cuts:
        scan.forward(first, count, known[:, first : first + count], u)
    grads = tuple(torch.randn(batch, steps, size) for _ in states)
    last = tuple(torch.randn(batch, size) for _ in states)
    grad_u = torch.randn(batch, steps, dims)
    grad_sums = torch.full((batch, steps, width), torch.nan)
    scan = scan_of(Pointwise(kind), step, chunk, dims, states, kept)  # as in chunked_scan
    scan.start_backward(grads, last)
    for first, count in reversed(cuts):
        scan.backward(first, count, grad_u[:, first : first + count].clone(), grad_sums[:, first : first + count])
    return [*kept, u, grad_sums, *scan.initial_gradients()]


# kind, batch, hidden size, D, windows, N, C, T, rows per program
FEEDBACK = [
    ("tanh", 3, 5, 1, 1, 4, 8, 27, 2),
    ("tanh", 2, 7, 2, 1, 33, 4, 9, 1),
    ("tanh", 1, 3, 2, 1, 4, 4, 17, 1),
    ("lstm", 3, 5, 2, 2, 17, 4, 13, 1),
    ("linear", 5, 0, 3, 3, 5, 2, 8, 4),
    ("gru", 2, 3, 1, 1, 300, 4, 7, 2),
    ("tanh", 2, 3, 9, 1, 4, 2, 5, 1),  # more dimensions than the kernels take
]


def run_feedback(scan_of, kind, batch, size, dims, windows, order, chunk, steps):
    """The same for chunks that the memory joins, cut into two segments, with and without gradients of the memory itself."""
    torch.manual_seed(0)
    states = tuple(torch.randn(batch, size) for _ in range(1 + (kind == "lstm")))
    width = dims + size * (4 if kind in ("lstm", "gru") else 1)
    step = torch.randn((chunk - 1) * dims + size, width) * 0.5 / (size + dims) ** 0.5
    chunks = -(-steps // chunk)
    segment = chunks // 2 * chunk
    # Small enough that rounding fades from chunk to chunk rather than grows.
    power = torch.randn(windows, order, order) * 0.5 / order**0.5
    fold = torch.randn(dims * order, chunk * width) * 0.5 / (dims * order) ** 0.5
    operators = ChunkOperators(step, power, torch.randn(windows, chunk, order) * 0.5 / chunk**0.5, fold)
    known = torch.randn(batch, chunks * chunk, width)
    kept = tuple(tensor.fill_(torch.nan) for tensor in Pointwise(kind).allocate(states, steps))
    u, starts = known.new_full((batch, chunks * chunk, dims), 0.0), known.new_full((batch, chunks, dims * order), torch.nan)
    scan = scan_of(Pointwise(kind), step, chunk, dims, states, kept)
    memory = torch.randn(batch, dims, order)
    for first, length in ((0, segment), (segment, chunks * chunk - segment)):
        of_segment = known[:, first : first + length].clone()
        memory = scan.feedback_forward(first, of_segment, u, starts, memory, operators)
    grads = tuple(torch.randn(batch, steps, size) for _ in states)
    last = tuple(torch.randn(batch, size) for _ in states)
    results = [*kept, u, starts]
    for grad_starts in (None, torch.randn_like(starts)):
        grad_u = torch.randn_like(u)
        scan = scan_of(Pointwise(kind), step, chunk, dims, states, kept)
        scan.start_backward(grads, last)
        after = torch.randn(batch, dims * order)
        for first, length in ((segment, chunks * chunk - segment), (0, segment)):
            # Where the last chunk is not full, its sums have no gradients.
            grad_sums = torch.zeros(batch, length, width)
            arrived = torch.full((batch, length // chunk + 1, dims * order), torch.nan)
            arrived[:, -1] = after
            scan.feedback_backward(first, grad_u, grad_sums, grad_starts, arrived, operators)
            after = arrived[:, 0]
            results += [grad_sums, arrived]
        results += scan.initial_gradients()
    return results


# ---- in the process of the interpreter


class Kept:
    """A kernel that the interpreter launches as if it were compiled: by name at first, then with all arguments in order."""

    def __init__(self, kernel):
        self.kernel, self.arg_names, self.in_order = kernel, kernel.arg_names, 0

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            self.in_order += bool(arguments)
            # The interpreter does not mind, but Triton refuses names that a kernel does not have.
            assert named.keys() <= {*self.arg_names, "num_warps", "num_stages"}
            self.kernel[grid](*arguments, **named)
            return self

        return launch


def force_rows(patch, rows):
    """So many rows to each program, for whose sake alone no matrix is held."""
    from lmu_hf.model import triton_scan

    patch.setattr(triton_scan, "rows_per_program", lambda batch, like: rows)
    if rows > 1:
        patch.setattr(triton_scan, "holds", lambda *of_step: False)


def interpreted(runs, *case, rows):
    """Results, and how many launches in either direction took what was kept of the ones before."""
    from lmu_hf.model import triton_scan

    loops = (triton_scan.TritonScan, triton_scan.HeldScan)
    kept = [tuple(map(Kept, loop.kernels)) for loop in loops]
    with pytest.MonkeyPatch.context() as patch:
        force_rows(patch, rows)
        for loop, kernels in zip(loops, kept, strict=True):
            patch.setattr(loop, "kernels", kernels)
        results = runs(triton_scan.TritonScan, *case)
    return results, [sum(kernel.in_order for kernel in way) for way in zip(*kept, strict=True)]


def interpreted_layer(arguments, autocast, weights, x, lengths):
    """Output, final state and gradients of a layer, and which scan it took."""
    layer = LMU(3, 2, 4, 9.0, return_sequences=True, return_state=True, **arguments)
    layer.load_state_dict(weights)
    results = everything(layer, x, lengths, autocast)
    return scan_name(x), results


def everything(layer, x, lengths, autocast):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, state = layer(x, lengths=lengths)
    results = [output.float(), *(part.float() for part in state.tensors())]
    loss = sum((part * torch.linspace(-1, 1, part.numel()).view_as(part)).sum() for part in results)
    return [part.detach() for part in results] + list(torch.autograd.grad(loss, [x, *layer.parameters()]))


def scan_name(like):
    return scan_class(like).__name__


def process(**environment):
    """One process with these variables, and without the compiled CPU loop, which would be taken first."""
    # Set before its interpreter starts, which a spawned process takes over.
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return pool


@pytest.fixture(scope="module")
def interpreter():
    with process(TRITON_INTERPRET="1", LMU_HF_NATIVE="0", OMP_NUM_THREADS="1") as pool:
        yield pool


def named(parameter):
    return getattr(parameter, "__name__", str(parameter))


def close(ours, naive, tolerance):
    assert torch.isfinite(naive).all()
    assert ours.shape == naive.shape
    if naive.numel():
        assert float((ours - naive).abs().max()) < tolerance * max(1.0, float(naive.abs().max()))


@with_triton
@pytest.mark.parametrize(
    ("runs", "case"), [(run, case) for case in CASES] + [(run_feedback, case) for case in FEEDBACK], ids=named
)
def test_equals_naive(interpreter, runs, case):
    *case, rows = case
    results, _ = interpreter.submit(interpreted, runs, *case, rows=rows).result()
    for ours, naive in zip(results, runs(NaiveScan, *case), strict=True):
        # Sums of up to 850 products in float32, added in another order: 1e-6 at most was seen, through twenty steps.
        close(ours, naive, 5e-6)


@with_triton
@pytest.mark.parametrize(("rows", "batch"), [(1, 5), (2, 2)])
def test_what_was_compiled_is_launched_again(interpreter, rows, batch):
    # Four and five chunks, in segments whose rows lie apart differently: two first launches of nine, and backwards that twice.
    case = ("tanh", batch, 4, 1, 1, 4, 4, 36)
    results, in_order = interpreter.submit(interpreted, run_feedback, *case, rows=rows).result()
    assert in_order == [7, 14]
    for ours, naive in zip(results, run_feedback(NaiveScan, *case), strict=True):
        close(ours, naive, 5e-6)


LAYERS = {
    "coupled": {"hidden_cell": "rnn", "hidden_size": 5, "hidden_to_memory": True, "memory_to_memory": True},
    "coupled gru": {"hidden_cell": "gru", "hidden_size": 5, "hidden_to_memory": True, "input_to_hidden": True},
    "u only": {"hidden_cell": "dense", "hidden_size": 5, "memory_to_memory": True},
    "uncoupled lstm": {"hidden_cell": "lstm", "hidden_size": 5},
}


@with_triton
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_whole_layers(interpreter, name, autocast):
    layer = LMU(3, 2, 4, 9.0, return_sequences=True, return_state=True, **LAYERS[name])
    x, lengths = torch.randn(4, 13, 3), torch.tensor([13, 7, 8, 0])
    submitted = interpreter.submit(interpreted_layer, LAYERS[name], autocast, layer.state_dict(), x, lengths)
    scan, results = submitted.result()
    assert scan == "TritonScan"
    layer.algorithm = "naive"
    # Rounding in float32 through 13 coupled steps; under autocast all products of the naive layer are of bfloat16, 8 bits.
    tolerance = 0.05 if autocast else 2e-5
    for ours, naive in zip(results, everything(layer, x, lengths, autocast), strict=True):
        close(ours, naive, tolerance)


def nan_passes(pool_case):
    from lmu_hf.model import triton_scan

    outputs = []
    for kind in GATES:
        states = tuple(torch.zeros(2, 3) for _ in range(1 + (kind == "lstm")))
        kept = Pointwise(kind).allocate(states, 2)
        known = torch.full((2, 2, 3 * (4 if kind in ("lstm", "gru") else 1)), 0.5)
        known[0] = torch.nan
        scan = triton_scan.TritonScan(Pointwise(kind), torch.ones(3, known.shape[2]), 1, 0, states, kept)
        scan.forward(0, 2, known, torch.empty(2, 2, 0))
        outputs.append(kept[0])
    return outputs


@with_triton
def test_nan_stays_in_its_row(interpreter):
    for output in interpreter.submit(nan_passes, None).result():
        assert output[0].isnan().all()
        assert output[1].isfinite().all()


@with_triton
def test_pointwise_functions_to_the_last_digits(interpreter):
    x = torch.cat([torch.linspace(-30, 30, 255), torch.logspace(-8, 1, 254), torch.tensor([0.0, -100.0, 100.0])])
    for kind in ("tanh", "sigmoid"):
        ours = interpreter.submit(pointwise, kind, x).result()
        exact = getattr(torch, kind)(x.double())
        # A few times float32's 6e-8, relative: near 0 too, where gradients are made of it.
        assert float(((ours - exact) / exact.abs().clamp(min=1e-30)).abs()[exact.abs() > 1e-30].max()) < 5e-7


def pointwise(kind, x):
    from lmu_hf.model import triton_scan

    states = (torch.zeros(len(x) // 16, 16),)
    kept = Pointwise(kind).allocate(states, 1)
    with pytest.MonkeyPatch.context() as patch:
        force_rows(patch, 4)
        scan = triton_scan.TritonScan(Pointwise(kind), torch.zeros(16, 16), 1, 0, states, kept)
    scan.forward(0, 1, x.view(-1, 1, 16), torch.empty(len(x) // 16, 1, 0))
    return kept[0].flatten().double()


# ---- compiled, without a GPU

COMPILED = [
    # kind, hidden size, D, C, rows per program, N
    ("tanh", 212, 1, 16, 1),
    ("tanh", 212, 1, 32, 1, 256),
    ("tanh", 212, 1, 32, 4),
    ("tanh", 212, 2, 16, 2, 100),
    ("tanh", 300, 1, 16, 1, 256),
    ("relu", 30, 3, 8, 1, 20),
    ("lstm", 64, 2, 16, 4, 100),
    ("tanh", 212, 0, 16, 1),
    ("relu", 128, 64, 4, 1),
    ("sigmoid", 5, 2, 8, 1),
    ("linear", 0, 2, 8, 1),
    ("lstm", 64, 1, 16, 1),
    ("lstm", 212, 0, 16, 2),
    ("gru", 212, 1, 16, 1),
]


def kernels_of(case):
    """The two kernels that a case takes, or, of a segment with memory, both kernels of that too; each with its constants."""
    from lmu_hf.model import triton_held, triton_scan

    kind, size, dims, chunk, rows, *order = case
    if rows > 1 or not triton_held.holds(kind, size, dims, chunk):
        sizes = triton_scan.block_sizes(*case)
        backward = triton_scan.backward_sizes(sizes)
        return [(triton_scan.forward_kernel, sizes), (triton_scan.backward_kernel, backward)]
    sizes = triton_held.held_sizes(kind, size, dims, chunk)
    kernels = [(triton_scan.held_forward_kernel, sizes), (triton_scan.held_backward_kernel, sizes)]
    if order:
        sizes = triton_scan.segment_sizes(kind, size, dims, chunk, *order, 100)
        backward = {**triton_scan.segment_backward_sizes(sizes), "STARTS": True}
        kernels += [(triton_scan.segment_forward_kernel, sizes), (triton_scan.segment_backward_kernel, backward)]
    return kernels


def compile_for(architecture, case, tmp_path):
    """The kernels of a case for an architecture: PTX, machine code and shared memory of each."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lmu_hf.model import triton_scan

    os.environ["TRITON_CACHE_DIR"] = tmp_path  # nothing is taken from an earlier run
    results = []
    numbers = {"first", "count", "chunks", "batch", "steps", "known_step", "system", "further"}
    for kernel, constants in kernels_of(case):
        sizes = triton_scan.taken(kernel, constants)
        options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
        signature = dict.fromkeys(kernel.arg_names, "*fp32")
        signature |= {name: "i32" for name in signature if name in numbers or name.endswith("_row")}
        signature |= {name: "*i32" for name in signature if name == "counter"}
        signature |= dict.fromkeys(sizes, "constexpr")
        # As at a launch: torch's tensors start at a multiple of 16 bytes.
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
        source = ASTSource(fn=kernel, signature=signature, constexprs=sizes, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        results.append((compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared))
    return results


@pytest.fixture(scope="module")
def compiler():
    with process(TRITON_INTERPRET="0", LMU_HF_NATIVE="0", OMP_NUM_THREADS="1") as pool:
        yield pool


@with_triton
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiles(compiler, case, architecture, tmp_path):
    for ptx, machine_code, shared in compiler.submit(compile_for, architecture, case, str(tmp_path)).result():
        assert f".target sm_{architecture}" in ptx
        assert machine_code[:4] == b"\x7fELF"
        assert "bar.sync" in ptx  # between the steps
        assert "mma" not in ptx  # float32 is float32
        assert shared <= 48 * 1024  # what every GPU gives without being asked
        if case[1] >= 64:
            assert "ld.global.v4" in ptx.replace("ld.global.L1::evict_last.", "ld.global.")  # the matrix, 16 bytes at a time


# ---- without Triton, or without need of it


def test_every_kind_has_a_kernel():
    if TRITON:
        from lmu_hf.model import triton_scan

        assert set(triton_scan.KINDS) == set(GATES)


def test_triton_is_imported_only_when_needed():
    code = (
        "import sys, torch\nfrom lmu_hf import LMU\n"
        "layer = LMU(1, 1, 4, 9.0, 'rnn', 3, hidden_to_memory=True)\n"
        "before = 'triton' in sys.modules\n"  # transformers may have looked at it
        "layer(torch.randn(1, 5, 1))\n"
        "assert 'lmu_hf.model.triton_scan' not in sys.modules and before == ('triton' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "0"})


def test_naive_where_triton_is_missing(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("LMU_HF_NATIVE", "0")
    monkeypatch.setattr("lmu_hf.model.scan.available", lambda like: False)
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("triton_scan", "triton_steps", "triton_parts"):
        monkeypatch.delitem(sys.modules, f"lmu_hf.model.{name}", raising=False)
    assert scan_class(torch.ones(2)) is NaiveScan


@pytest.mark.parametrize(
    "like", [torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float16), torch.ones(2, device="meta")]
)
def test_what_stays_naive(like, monkeypatch):
    monkeypatch.setattr("lmu_hf.model.scan.available", lambda like: False)
    assert scan_class(like) is NaiveScan


def test_a_checkpoint_does_not_ask_for_triton():
    from transformers.dynamic_module_utils import get_imports

    from lmu_hf.model import scan

    folder = os.path.dirname(scan.__file__)
    for name in ("scan", "triton_scan", "triton_steps", "triton_parts"):
        assert "triton" not in get_imports(os.path.join(folder, f"{name}.py"))


@pytest.mark.parametrize(("feedback", "segments"), [(False, 25), (True, 17)])
def test_segments_are_longer_on_cuda(feedback, segments):
    step = torch.empty(212, 212)
    memory = torch.empty(100, 1, 256)
    operators = ChunkOperators(step, response=torch.empty(1, 16, 256))
    on_cpu = _Sizes(100, 784, memory, operators, feedback=feedback)

    class OnCuda(torch.Tensor):
        is_cuda = True

    on_cuda = _Sizes(100, 784, memory, operators._replace(step=step.as_subclass(OnCuda)), feedback=feedback)
    assert sum(length for _, length in on_cuda.segments()) == sum(length for _, length in on_cpu.segments()) == 784
    assert len(on_cuda.segments()) == 1
    assert len(on_cpu.segments()) == segments
