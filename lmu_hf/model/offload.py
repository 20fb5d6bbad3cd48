"""Weights that accelerate keeps on the CPU or on disk, brought in for a whole layer at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def weights_at_hand(module: nn.Module) -> Iterator[None]:
    """Has the weights of a module and its parts where they compute, for as long as the block runs.

    With a ``device_map`` that offloads, accelerate brings the weights of each part in when its ``forward`` is called, and an
    uninitialised tensor is found at any other time. An LMU reads weights of its parts without calling these.
    """
    parts: list[Any] = []
    if not torch.compiler.is_compiling():
        parts = [part for part in module.modules() if hasattr(part, "_hf_hook")]
    hooked = [part.forward for part in parts]
    for part in parts:
        part._hf_hook.pre_forward(part)
        part.forward = part._old_forward  # a call in the block must not put the weights away again
    try:
        yield
    finally:
        for part, forward in zip(parts, hooked, strict=True):
            part.forward = forward
            part._hf_hook.post_forward(part, None)
