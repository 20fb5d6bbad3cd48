"""One process among those of a launcher such as torchrun or ``accelerate launch``: which one, and what all of them agree on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import InputError

# What a launcher tells its processes. A process of our own must not take itself for one of them.
_OF_A_LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def processes() -> int:
    """How many processes a launcher such as torchrun has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that reports and writes: of all machines, the first."""
    return int(os.environ.get("RANK", "0")) == 0


def is_first_here() -> bool:
    """Whether this is the first process on its machine, which tells what is wrong there."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def on_cpus(wanted: bool = False) -> bool:
    """Whether the processes of a launcher compute on CPUs, wanted or for lack of anything else."""
    if wanted or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        return True
    import torch

    return processes() > 1 and not torch.accelerator.is_available()


def connect(use_cpu: bool = False) -> None:
    """Connects the processes of a launcher; nothing where there is but one.

    Args:
        use_cpu: the experiment's ``training.use_cpu``.
    """
    if processes() > 1:
        from accelerate import PartialState

        # Told nothing on a machine without accelerator, accelerate would leave each process by itself.
        PartialState(cpu=on_cpus(use_cpu))


@contextmanager
def connected(use_cpu: bool = False) -> Iterator[None]:
    """The processes of a launcher, connected until they are done with what they do together; see :func:`connect`."""
    connect(use_cpu)
    if processes() == 1:
        yield
        return
    import gc

    import torch

    # Whoever lets go of a group on CPUs last waits for its threads, one of which may be waiting for the GIL to free a tensor. The
    # model's DDP wrapper would hold the GIL meanwhile, and hang now and then; a reference from Python does not.
    last = torch.distributed.group.WORLD
    try:
        yield
    finally:
        gc.collect()  # whatever of the model still hangs in a cycle
        del last


def of_the_first(value: Any) -> Any:
    """The value that the first process has, in all of them, which are connected.

    ``value`` may be an InputError, which is then raised in each of them: none waits for one that has stopped.
    """
    if processes() > 1:
        from accelerate.utils import broadcast_object_list

        (value,) = broadcast_object_list([value])
    if isinstance(value, InputError):
        raise value
    return value


def lone_environment() -> dict[str, str]:
    """The environment for a process of our own that is none of the launcher's."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_A_LAUNCHER and not name.startswith(("TORCHELASTIC_", "ACCELERATE_", "FSDP_"))
    }
