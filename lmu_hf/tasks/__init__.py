"""Datasets and what an experiment needs to know of them; one module per task, loaded when it is used."""

from importlib import import_module
from typing import Any

from ..errors import InputError
from .base import Part, TaskData

TASKS = ("digits", "psmnist", "signals")


def load_task(name: str, data: str | None = None, processor: Any = None, **options: Any) -> TaskData:
    """Loads a task.

    Args:
        name: one of ``TASKS``.
        data: local file or folder, or id of a dataset on the Hub; None for the task's own.
        processor: that of a trained model, to process the data exactly as it was trained; made for the data when None.
        **options: options of the task's ``load`` function.

    Raises:
        InputError: the task or an option is unknown, or the data is missing or wrong.
    """
    if name not in TASKS:
        raise InputError(f"task: expected one of {list(TASKS)}, found {name!r}")
    if data is not None and not data.strip():
        raise InputError("data: expected a file, a folder or the id of a dataset on the Hub, found an empty text")
    module = import_module(f".{name}", __package__)
    known = module.OPTIONS
    if unknown := sorted(str(option) for option in set(options) - set(known)):
        raise InputError(f"task: {name} takes the options {sorted(known)}, found {unknown}")
    return module.load(data, processor, **options)


__all__ = ["TASKS", "Part", "TaskData", "load_task"]
