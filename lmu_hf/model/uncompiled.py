"""What ``torch.compile`` calls as it is. Imported when it is needed, since it brings in the compiler: half a second."""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="a loop over time has kernels of its own; algorithm='naive' lets it be unrolled")
def run_uncompiled(run: Callable[..., Any], *args: Any) -> Any:
    """For loops over time, of which the compiler would make a graph of every step, several times as slow."""
    return run(*args)
