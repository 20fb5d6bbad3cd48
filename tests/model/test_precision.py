"""Products that carry the memory are never rounded to tf32, and the caller's setting is as before afterwards.

There is no CUDA device here: torch keeps the setting all the same, and a stand-in tells the context that a tensor is on one.
"""

import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmu_hf.model import by_system, chunked_scan, memory, plan, precision, recurrent_scan, scan, stepper, time_loop
from lmu_hf.model.layer import LMU
from lmu_hf.model.precision import exact_matmul, full_float32

CUDA = SimpleNamespace(is_cuda=True)
MATMUL = torch.backends.cuda.matmul


def everything():
    """All of torch's settings, "raises" for those of the older names that cannot be read beside the newer ones."""
    found = [MATMUL.fp32_precision, torch.backends.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
    for read in (lambda: MATMUL.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:
            found.append("raises")
    return found


@pytest.fixture(autouse=True)
def _restored():
    before = everything()
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert everything() == before


def allow():
    MATMUL.allow_tf32 = True


def new():
    MATMUL.fp32_precision = "tf32"


def generic():
    torch.backends.fp32_precision = "tf32"


WAYS = {
    "default": lambda: None,
    "allow_tf32": allow,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "fp32_precision": new,
    "all backends": generic,
}


@pytest.mark.parametrize("way", WAYS)
def test_off_inside_and_back_after(way):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WAYS[way]()
        before = everything()
        with full_float32(CUDA):
            assert MATMUL.fp32_precision in ("ieee", "none")  # both mean float32 here
            assert not MATMUL.allow_tf32  # and the older name can be read
        assert everything() == before
        with pytest.raises(ZeroDivisionError), full_float32(CUDA):
            raise ZeroDivisionError
        assert everything() == before


def test_what_is_inherited_still_is():
    generic()
    with full_float32(CUDA):
        pass
    torch.backends.fp32_precision = "ieee"
    assert MATMUL.fp32_precision == "ieee"


def test_the_last_to_leave_restores():
    new()
    entered, leave = threading.Event(), threading.Event()
    inside = []

    def other():
        with full_float32(CUDA):
            entered.set()
            leave.wait(10)
            inside.append(MATMUL.fp32_precision)

    with full_float32(CUDA):
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(10)
        with full_float32(CUDA):
            pass
    assert MATMUL.fp32_precision == "ieee"
    leave.set()
    thread.join()
    assert inside == ["ieee"]
    assert MATMUL.fp32_precision == "tf32"


def test_nothing_happens_on_the_cpu(monkeypatch):
    monkeypatch.setattr(precision, "_switch_off", lambda: pytest.fail("touched"))
    x = torch.ones(2, 2)
    assert full_float32(x) is full_float32(x)
    with full_float32(x):
        assert exact_matmul(x, x).sum() == 8


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Tensors of the CPU are treated like those of CUDA, as far as this setting goes."""
    for module in (precision, by_system, chunked_scan, recurrent_scan, time_loop, memory, scan, stepper):
        monkeypatch.setattr(module, "full_float32", lambda like: precision._FullFloat32())


def test_derivatives_of_exact_matmul(as_on_cuda):
    for shapes in [((3, 4), (4, 2)), ((1, 3, 4), (4, 2)), ((2, 1, 3, 4), (5, 4, 2))]:
        tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        assert torch.equal(exact_matmul(*tensors), tensors[0] @ tensors[1])
        assert torch.autograd.gradcheck(exact_matmul, tensors)
        assert torch.autograd.gradgradcheck(exact_matmul, tensors)


class Products(TorchDispatchMode):
    """Notes the setting under which each product ran, and the shapes of its factors."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"):
            shapes = [tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)]
            self.found.append((MATMUL.fp32_precision, shapes[-2:]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("theta", [40.0, [40.0, 90.0]])
@pytest.mark.parametrize("path", ["coupled", "folded", "written", "chunked", "final", "fft", "naive"])
def test_the_memory_is_carried_in_float32(path, theta, as_on_cuda, python_loop, monkeypatch):
    order = 101  # no other axis here is a multiple of it
    way = (path if path in ("folded", "written") else "lookahead", 16)
    monkeypatch.setattr(plan, "recurrence_algorithm", lambda *_, **__: way)
    coupled = {"hidden_to_memory": True, "memory_to_memory": True} if path == "coupled" else {}
    hidden = ("rnn", 5) if path in ("coupled", "folded", "written") else (None, None)
    layer = LMU(3, 2, order, theta, *hidden, return_sequences=path != "final", return_state=True, **coupled)
    layer.algorithm = path if path in ("chunked", "final", "fft", "naive") else "auto"
    x = torch.randn(4, 70, 3, requires_grad=True)
    start = layer.cell.initial_state(x).tensors()
    start = (torch.randn_like(start[0]).requires_grad_(), *start[1:])
    layer(x, start)[0].sum().backward()  # the operators, in float64 and cached, are none of this
    new()
    with Products() as products:
        layer(x, start)[0].sum().backward()
    assert MATMUL.fp32_precision == "tf32"
    # With operators of the memory, rather than with weights or for the gradients of weights.
    weights = {tuple(p.shape) for p in layer.parameters()} | {tuple(reversed(p.shape)) for p in layer.parameters()}
    weights.add((2, 5))  # u -> gates of its own step, which is made of them
    carries = [
        (setting, shapes)
        for setting, shapes in products.found
        if any(size % order == 0 for size in shapes[1][-2:])
        and not {shapes[1][-2:], (shapes[0][-2], shapes[1][-1])} & weights
    ]
    assert carries
    assert {setting for setting, _ in carries} == {"ieee"}, [c for c in carries if c[0] != "ieee"]


def test_a_merged_memory_is_carried_in_float32(as_on_cuda, python_loop):
    layer = LMU(3, 2, 101, 40.0, "rnn", 5, return_sequences=True, algorithm="merged")
    x = torch.randn(4, 70, 3, requires_grad=True)
    new()
    with Products() as products:
        layer(x).sum().backward()
    # [m, h] -> [m', gates], forwards and backwards.
    settings = [setting for setting, shapes in products.found if shapes == [(4, 2 * 101 + 5), (2 * 101 + 5, 2 * 101 + 5)]]
    assert len(settings) == 2 * 70
    assert set(settings) == {"ieee"}


@pytest.mark.parametrize("theta", [40.0, [40.0, 90.0]])
def test_the_memory_of_a_stream_is_kept_in_float32(theta, as_on_cuda, python_loop):
    order = 101
    stream = LMU(3, 2, order, theta, "rnn", 5).stepper(4)
    new()
    with Products() as products:
        stream(torch.randn(4, 3))
    # [m, x, 1, h] -> gates and u; [u, m] -> m'.
    of_u, of_memory = (2 * order + 3 + 1 + 5, 5 + 2), (2 + 2 * order, 2 * order)
    settings = [setting for setting, shapes in products.found if shapes[-1] in (of_u, of_memory)]
    assert settings == ["ieee", "ieee"]
