"""Products that must not be rounded to TensorFloat-32.

A product in tf32 is off by 4e-4 or so. In one that carries the memory from chunk to chunk the error adds up over the sequence, so
these run in full float32 whatever the process allows elsewhere, with ``torch.backends.cuda.matmul.fp32_precision``,
``allow_tf32`` or ``torch.set_float32_matmul_precision``. All others follow the caller's setting.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .compiled import matmul, outdoes_blas

_mkldnn: Any = torch.backends.mkldnn
_NOTHING: AbstractContextManager = nullcontext()
_lock = threading.Lock()
_inside = 0
_restore: Callable[[], None] | None = None


def full_float32(like: Tensor) -> AbstractContextManager:
    """A context in which products of float32 tensors like this one are not rounded. Does nothing on the CPU.

    The setting belongs to the process, so that products of other threads are exact for the moment too. The first thread to enter
    changes it and the last to leave restores it.
    """
    return _FullFloat32() if like.is_cuda and not torch.compiler.is_compiling() else _NOTHING


class _FullFloat32(AbstractContextManager):
    entered = False

    def __enter__(self) -> None:
        global _inside, _restore
        with _lock:
            if not _inside:
                _restore = _switch_off()
            if _restore is not None:
                _inside += 1
                self.entered = True

    def __exit__(self, *error: object) -> None:
        global _inside, _restore
        if not self.entered:
            return
        with _lock:
            _inside -= 1
            if not _inside:
                assert _restore is not None
                _restore()
                _restore = None


def _switch_off() -> Callable[[], None] | None:
    """Returns what restores the setting, or None if nothing had to be done."""
    matmul = torch.backends.cuda.matmul
    found = matmul.fp32_precision
    if found in ("none", "ieee"):
        return None
    # The older names keep a setting of their own beside this one; once the two contradict each other, reading the older raises.
    # So it is changed through the names that it was made with, and they can be read again inside and afterwards.
    try:
        legacy = torch.get_float32_matmul_precision() if matmul.allow_tf32 else None
    except RuntimeError:
        legacy = None
    if legacy is None:
        matmul.fp32_precision = "ieee"
        return lambda: _restore_new(found)
    on_cpu = _mkldnn.matmul.fp32_precision
    torch.set_float32_matmul_precision("highest")
    return lambda: _restore_legacy(legacy, on_cpu)


def _restore_new(found: str) -> None:
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "none"  # inherits, if that is where it came from
    if matmul.fp32_precision != found:
        matmul.fp32_precision = found


def _restore_legacy(found: str, on_cpu: str) -> None:
    torch.set_float32_matmul_precision(found)
    _mkldnn.matmul.fp32_precision = on_cpu  # which ``allow_tf32`` would not have changed


def exact_matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in :func:`full_float32`, and so its derivatives, where autograd computes them. Matrices, or stacks of them.

    On the CPU by :func:`compiled.matmul` where that outdoes BLAS.
    """
    if full_float32(left) is _NOTHING and not _outdone(left, right):
        return left @ right
    return _Matmul.apply(left, right)


def _outdone(left: Tensor, right: Tensor) -> bool:
    return left.ndim == right.ndim == 2 and outdoes_blas(left, right)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return matmul(left, right) if _outdone(left, right) else left @ right


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        with full_float32(left):
            return _product(left, right)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        to_left = exact_matmul(grad, right.mT).sum_to_size(left.shape) if ctx.needs_input_grad[0] else None
        to_right = exact_matmul(left.mT, grad).sum_to_size(right.shape) if ctx.needs_input_grad[1] else None
        return to_left, to_right
