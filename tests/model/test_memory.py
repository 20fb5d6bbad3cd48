"""Every memory algorithm against the naive one: output, final state and gradients, at odd sizes."""

import pytest
import torch

from lmu_hf.model import memory as module
from lmu_hf.model.compiled import LARGEST_ORDER
from lmu_hf.model.costs import MANY_ROWS
from lmu_hf.model.legendre import DelaySystem, delay_system
from lmu_hf.model.memory import ALGORITHMS, linear_memory

FAST = [name for name in ALGORITHMS if name != "naive"]
# (batch, steps, dims, order, theta): one step, primes, around the chunk sizes, longer than 5 theta, several scales.
SHAPES = [
    (3, 1, 2, 4, 6.0),
    (2, 2, 1, 1, 2.0),
    (3, 63, 2, 8, 10.0),
    (2, 64, 1, 7, 13.0),
    (2, 65, 3, 5, (4.0, 9.0, 20.0)),
    (20, 47, 1, 33, 50.0),
    (1, 40, 5, 16, 11.0),
    (5, 40, 2, 31, (20.0, 7.0)),
    (1, 193, 1, 64, 30.0),
    # So many rows that each chunk is a product of its own.
    (MANY_ROWS // 2 + 1, 37, 2, 5, 9.0),
    (MANY_ROWS, 19, 2, 3, (4.0, 9.0)),
    # The same with fewer steps than numbers, and with more, in chunks of which neither is a multiple.
    (MANY_ROWS, 21, 1, 33, 30.0),
    (MANY_ROWS // 2 + 1, 43, 2, 21, (40.0, 17.0)),
]


@pytest.fixture(autouse=True)
def _compiled_where_asked(request):
    """ "scan" is compiled or nothing."""
    asked = getattr(request.node, "callspec", None)
    if asked is not None and "scan" in [*asked.params.values(), asked.params.get("arguments", {}).get("algorithm")]:
        request.getfixturevalue("compiled_loop")


# float64: rounding of ~200 steps. float32: the chunked state is good to ~5e-7 of its size, which is about 1 to 3 here.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def run(algorithm, u, system, m0, lengths):
    u, m0 = u.clone().requires_grad_(), None if m0 is None else m0.clone().requires_grad_()
    states, final = linear_memory(u, system, m0, lengths, return_sequence=algorithm != "final", algorithm=algorithm)
    weight = torch.linspace(-1, 1, final.numel(), dtype=final.dtype).view(final.shape)
    gradients = torch.autograd.grad((final * weight).sum(), [u] if m0 is None else [u, m0], retain_graph=True)
    if states is not None:
        weight = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view(states.shape)
        gradients += torch.autograd.grad((states * weight).sum(), [u] if m0 is None else [u, m0], allow_unused=True)
    return states, final, gradients


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("initial", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize(
    ("algorithm", "shape"),
    [(name, shape) for name in FAST for shape in SHAPES if name != "scan" or shape[3] <= LARGEST_ORDER],
    ids=str,
)
def test_equals_naive(algorithm, shape, initial, ragged, dtype):
    batch, steps, dims, order, theta = shape
    system = delay_system(order, theta)
    u = torch.randn(batch, steps, dims, dtype=dtype)
    m0 = torch.randn(batch, dims, order, dtype=dtype) if initial else None
    lengths = torch.randint(0, steps + 1, (batch,)) if ragged else None
    states, final, gradients = run(algorithm, u, system, m0, lengths)
    naive_states, naive_final, naive_gradients = run("naive", u, system, m0, lengths)
    assert (final - naive_final).abs().max() < TOLERANCE[dtype]
    if states is not None:
        assert (states - naive_states).abs().max() < TOLERANCE[dtype]
    for ours, naive in zip(gradients, naive_gradients, strict=False):
        scale = max(1.0, float(naive.abs().max()))
        assert (ours - naive).abs().max() < TOLERANCE[dtype] * scale


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "sizes", [(19, 23, 1, False), (26, 9, 2, True), (13, 11, 3, True), (1, 17, 5, False), (37, 1, 1, False)]
)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 23, 32])
def test_every_order_of_the_compiled_loop(order, sizes, threads, dtype, compiled_loop, set_threads):
    """Rows that go through the steps together, and those left over; the gradients of the system, too."""
    set_threads(threads)
    batch, steps, dims, own = sizes
    scales = dims if own else 1
    Ad = 0.7 * torch.randn(scales, order, order, dtype=dtype) / order**0.5
    tensors = [
        torch.randn(batch, steps, dims, dtype=dtype),
        torch.randn(batch, dims, order, dtype=dtype),
        Ad,
        torch.randn(scales, order, dtype=dtype),
    ]
    weight = torch.randn(batch, steps, dims, order, dtype=dtype)
    results = []
    for scan in (module._Scan.apply, naive_scan):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        states = scan(*leaves)
        results.append([states, *torch.autograd.grad((states * weight).sum(), leaves)])
    for ours, naive in zip(*results, strict=True):
        scale = max(1.0, float(naive.detach().abs().max()))
        assert (ours - naive).abs().max() < TOLERANCE[dtype] * scale


def naive_scan(u, memory, Ad, Bd):
    states = []
    for t in range(u.shape[1]):
        memory = module.memory_step(memory, u[:, t], Ad, Bd)
        states.append(memory)
    return torch.stack(states, dim=1)


def test_what_is_not_finite_stays_in_its_memory(compiled_loop):
    """Forwards in its row and dimension; backwards too, although vectors reach into the one behind it."""
    memory, Ad, Bd = torch.randn(9, 2, 5), torch.randn(1, 5, 5), torch.randn(1, 5)
    u, grad = torch.randn(9, 7, 2, requires_grad=True), torch.randn(9, 7, 2, 5)
    grad[4, 3, 1, 0] = torch.nan
    states = module._Scan.apply(u, memory, Ad, Bd)
    (gradient,) = torch.autograd.grad(states, u, grad)
    expected = torch.ones(9, 7, 2, dtype=torch.bool)
    expected[4, :4, 1] = False
    assert torch.equal(gradient.isfinite(), expected)


@pytest.mark.parametrize("initial", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize("shape", SHAPES[-4:], ids=str)
@pytest.mark.parametrize("size", [2, 4, 8, 16, 32])
def test_chunks_of_any_size_equal_naive(shape, size, initial, monkeypatch):
    monkeypatch.setattr("lmu_hf.model.memory.memory_chunk", lambda *sizes, **options: size)
    test_equals_naive("chunked", shape, initial, True, torch.float64)


@pytest.mark.parametrize("initial", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [2, 32])
def test_equals_naive_as_on_cuda(shape, size, initial, monkeypatch):
    monkeypatch.setattr("lmu_hf.model.memory.starts_at_once", lambda like: True)
    monkeypatch.setattr("lmu_hf.model.memory.memory_chunk", lambda *sizes, **options: size)
    test_equals_naive("chunked", shape, initial, True, torch.float64)


@pytest.mark.parametrize("initial", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize(("steps", "order"), [(3, 11), (11, 11), (13, 11), (12, 33), (40, 12), (41, 17)])
@pytest.mark.parametrize("theta", [9.0, (9.0, 14.0)])
@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_a_memory_that_began_empty(size, theta, steps, order, initial, monkeypatch):
    """Whose first chunks, of many rows, start from the inputs before them."""
    monkeypatch.setattr("lmu_hf.model.memory.MANY_ROWS", 1)
    monkeypatch.setattr("lmu_hf.model.memory.memory_chunk", lambda *sizes, **options: size)
    test_equals_naive("chunked", (3, steps, 2, order, theta), initial, True, torch.float64)


@pytest.mark.parametrize("discretizer", ["zoh", "euler"])
@pytest.mark.parametrize("scales", [1, 2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradcheck_with_theta(algorithm, scales, discretizer):
    u = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    m0 = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    theta_inv = (1 / torch.tensor([9.0, 14.0], dtype=torch.float64)[:scales]).requires_grad_()
    lengths = torch.tensor([7, 4])

    def call(u, m0, theta_inv):
        system = DelaySystem(theta_inv, 3, discretizer)
        states, final = linear_memory(u, system, m0, lengths, return_sequence=algorithm != "final", algorithm=algorithm)
        return final if states is None else (states, final)

    assert torch.autograd.gradcheck(call, (u, m0, theta_inv))


@pytest.mark.parametrize("initial", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize("many_rows", [1, MANY_ROWS])
@pytest.mark.parametrize("at_once", [False, True])
def test_second_derivative_of_chunks(many_rows, at_once, initial, monkeypatch):
    monkeypatch.setattr("lmu_hf.model.memory.MANY_ROWS", many_rows)
    monkeypatch.setattr("lmu_hf.model.memory.starts_at_once", lambda like: at_once)
    monkeypatch.setattr("lmu_hf.model.memory.memory_chunk", lambda *sizes, **options: 2)
    system = delay_system(5, (4.0, 9.0))
    u = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    m0 = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)

    def call(u, m0=None):
        states, _ = linear_memory(u, system, m0, algorithm="chunked")
        return states.sin()

    assert torch.autograd.gradgradcheck(call, (u, m0) if initial else (u,))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("cut", [1, 30, 64, 99])
def test_cut_anywhere_and_carry_the_state(algorithm, cut):
    system = delay_system(6, 17.0)
    u = torch.randn(2, 100, 3, dtype=torch.float64)
    sequence = algorithm != "final"
    whole, final = linear_memory(u, system, return_sequence=sequence, algorithm=algorithm)
    first, middle = linear_memory(u[:, :cut], system, return_sequence=sequence, algorithm=algorithm)
    second, end = linear_memory(u[:, cut:], system, middle, return_sequence=sequence, algorithm=algorithm)
    assert (end - final).abs().max() < 1e-12
    if sequence:
        assert (torch.cat([first, second], 1) - whole).abs().max() < 1e-12


def test_last_state_of_a_long_sequence_is_taken_in_segments():
    system = delay_system(5, 3000.0)
    u = torch.randn(2, 9001, 1, dtype=torch.float64)
    lengths = torch.tensor([9001, 4500])
    _, final = linear_memory(u, system, None, lengths, return_sequence=False, algorithm="final")
    _, chunked = linear_memory(u, system, None, lengths, algorithm="chunked")
    assert (final - chunked).abs().max() < 1e-11


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_padding_is_never_read(algorithm):
    system = delay_system(4, 8.0)
    u = torch.randn(3, 20, 2, dtype=torch.float64)
    lengths = torch.tensor([20, 11, 0])
    poisoned = u.clone()
    for row, length in enumerate(lengths):
        poisoned[row, length:] = torch.nan
    poisoned.requires_grad_()
    states, final = linear_memory(poisoned, system, None, lengths, return_sequence=algorithm != "final", algorithm=algorithm)
    for row, length in enumerate(lengths):
        if length:
            _, alone = linear_memory(u[row : row + 1, :length], system, algorithm="naive")
            assert (final[row] - alone[0]).abs().max() < 1e-12
        else:
            assert (final[row] == 0).all()
    if states is not None:
        assert all((states[row, length:] == 0).all() for row, length in enumerate(lengths))
    (gradient,) = torch.autograd.grad(final.sum() if states is None else states.sum() + final.sum(), poisoned)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_half_precision_keeps_a_float32_state(algorithm, dtype):
    system = delay_system(32, 200.0)
    u = torch.randn(2, 300, 1).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        _, final = linear_memory(u, system, return_sequence=algorithm != "final", algorithm=algorithm)
    _, exact = linear_memory(u.double(), system)
    assert final.dtype == torch.float32
    assert (final - exact).abs().max() < 1e-5  # the same as without autocast: float32 rounding of states of order 1


def test_order_256_in_float32():
    system = delay_system(256, 784.0)
    u = torch.rand(2, 784, 1, dtype=torch.float64)
    exact, _ = linear_memory(u, system, algorithm="naive")
    for algorithm in ("naive", "chunked", "fft"):
        states, _ = linear_memory(u.float(), system, algorithm=algorithm)
        # Float32 with matrices from float64: 2e-7 to 2e-6 was measured; float32 matrices would give 5e-4.
        assert float((states - exact).norm() / exact.norm()) < 4e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"algorithm": "final"}, "cannot return the sequence"),
        ({"algorithm": "parallel"}, "algorithm: expected 'auto' or one of"),
        ({"algorithm": "scan", "system": delay_system(33, 50.0)}, "an order of at most 32, found 33"),
        ({"u": torch.zeros(2, 0, 1)}, "u: expected .batch, time >= 1"),
        ({"u": torch.zeros(2, 5)}, "u: expected"),
        ({"initial_state": torch.zeros(2, 4)}, "initial_state: expected"),
        ({"lengths": torch.zeros(3)}, "lengths: expected one whole number per row"),
        ({"system": delay_system(4, (2.0, 3.0))}, "expected 1 or memory_d=1 values of theta"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_memory(**{"u": torch.zeros(2, 5, 1), "system": delay_system(4, 8.0), **arguments})
