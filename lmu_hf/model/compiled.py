"""Whether the operators of :mod:`lmu_hf.native` are there. A checkpoint that carries this file along runs without them."""

from collections.abc import Callable

import torch
from torch import Tensor

# Largest order for which the memory has an operator of its own; LANES in scan.cpp.
SMALL_ORDER = 8

_load: Callable[[], bool] | None = None


def offer(load: Callable[[], bool] | None) -> None:
    """Makes compiled operators known: ``load`` registers them on first use and tells whether they are there."""
    global _load
    _load = load


def available(like: Tensor) -> bool:
    """Whether compiled operators take tensors like this one: plain float32 or float64 ones on the CPU."""
    # Subclasses are tracers' stand-ins without memory behind them.
    plain = type(like) in (Tensor, torch.nn.Parameter) and like.device.type == "cpu"
    if not plain or like.dtype not in (torch.float32, torch.float64) or torch.compiler.is_compiling():
        return False
    return _load is not None and _load()
