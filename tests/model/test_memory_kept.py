"""The memory of large tensors of the compiled loops: used again, within bounds, and given back."""

import gc
import pickle
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from lmu_hf import LMU, native
from lmu_hf.model import compiled
from lmu_hf.model.compiled import available, contiguous, empty

MIB = 1 << 18  # numbers


@pytest.fixture(autouse=True)
def nothing_kept():
    if not available(torch.zeros(1)):
        pytest.skip("no compiled loop here")
    gc.collect()
    native.release_memory()
    yield
    native.release_memory()


def place_of(tensor):
    return tensor.untyped_storage().data_ptr()


def resident():
    """MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages / 256


def test_is_that_of_the_tensor_before():
    like = torch.zeros(1)
    first = empty(like, 8, MIB)
    place = place_of(first)
    assert first.shape == (8, MIB)
    assert first.dtype == like.dtype
    another = empty(like, 8, MIB)
    assert place_of(another) != place
    del first
    assert place_of(empty(like, 8, MIB)) == place
    assert place_of(empty(like, 6 * MIB)) == place, "a little smaller"
    assert place_of(empty(like.double(), 4, MIB)) == place, "another type"
    kept = empty(like, 5, MIB)
    assert place_of(kept) != place, "much smaller"


def test_small_ones_are_ordinary(monkeypatch):
    monkeypatch.setattr(compiled, "available", lambda like: pytest.fail("asked"))
    assert empty(torch.zeros(1, dtype=torch.float64), 3, 5).shape == (3, 5)


def test_a_tensor_may_grow():
    tensor = empty(torch.zeros(1), MIB).fill_(2.0)
    tensor.resize_(3 * MIB)
    assert bool((tensor[:MIB] == 2).all())
    assert tensor.shape == (3 * MIB,)


def test_a_tensor_is_like_any_other():
    tensor = empty(torch.zeros(1), 3, MIB).normal_()
    copy = tensor.clone()
    lazy = torch._lazy_clone(tensor)
    for one in (deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), torch.from_numpy(tensor.numpy()), lazy):
        assert torch.equal(one, copy)
    tensor += 1
    assert torch.equal(lazy, copy)
    tensor.share_memory_()
    assert torch.equal(tensor, copy + 1)


def test_contiguous():
    expanded = torch.tensor([1.5]).expand(3, MIB)
    copy = contiguous(expanded)
    assert copy.is_contiguous()
    assert torch.equal(copy, expanded)
    assert contiguous(copy) is copy


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells what is resident")
def test_no_more_is_kept_than_was_in_use():
    like, before = torch.zeros(1), resident()
    for size in (200, 150, 110, 170, 90):  # none fits another
        empty(like, size, MIB).fill_(1.0)
    assert resident() - before < 200 + 64 + 8
    native.release_memory()
    assert resident() - before < 8


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_results_outlive_it(cell):
    """What a run returned or saved is nobody else's, whatever comes after it."""
    torch.manual_seed(0)
    layer = LMU(1, 1, 6, 30.0, cell, 40, return_sequences=True)
    x = torch.randn(16, 120, 1)
    kept = [layer(x) for _ in range(3)]
    copies = [output.detach().clone() for output in kept]
    layer(x.flip(0)).sum().backward()
    native.release_memory()
    layer.zero_grad()
    layer(x.flip(0)).square().sum().backward()
    assert all(torch.equal(output, copy) for output, copy in zip(kept, copies, strict=True))
    grads = []
    for output in kept:
        layer.zero_grad()
        output.square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in layer.parameters()])
    for one in grads[1:]:
        for a, b in zip(one, grads[0], strict=True):
            assert torch.equal(a, b)


def test_threads_share_it():
    """Threads that take and give at the same time never get the same memory."""
    from concurrent.futures import ThreadPoolExecutor

    def work(value):
        for _ in range(40):
            tensor = empty(torch.zeros(1), MIB // 4 + value).fill_(value)
            other = empty(torch.zeros(1), MIB // 4).fill_(-value)
            if not (bool((tensor == value).all()) and bool((other == -value).all())):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(1, 5)))
