"""Datasets and what an experiment needs to know of them; one module per task, loaded when it is used."""

from importlib import import_module
from typing import Any

import numpy as np

from ..errors import InputError
from .base import Part, TaskData

TASKS = ("delay", "digits", "mackey_glass", "psmnist", "signals", "text")


def load_task(name: str, data: str | None = None, processor: Any = None, **options: Any) -> TaskData:
    """Loads a task.

    Args:
        name: one of ``TASKS``.
        data: local file or folder, or id of a dataset on the Hub; None for the task's own.
        processor: that of a trained model, to process the data exactly as it was trained; made for the data when None.
        **options: options of the task's ``load`` function; and for classification ``class_weights``, "balanced" or a list with a
            number > 0 per class.

    Raises:
        InputError: the task or an option is unknown, or the data is missing or wrong.
    """
    if name not in TASKS:
        raise InputError(f"task: expected one of {list(TASKS)}, found {name!r}")
    if data is not None and not data.strip():
        raise InputError("data: expected a file, a folder or the id of a dataset on the Hub, found an empty text")
    module = import_module(f".{name}", __package__)
    class_weights = options.pop("class_weights", None)
    known = module.OPTIONS
    if unknown := sorted(str(option) for option in set(options) - set(known)):
        raise InputError(f"task: {name} takes the options {sorted(known)}, found {unknown}")
    task = module.load(data, processor, **options)
    if class_weights is not None:
        task.class_weights = _class_weights(class_weights, task)
    return task


def _class_weights(wanted: Any, task: TaskData) -> list[float]:
    if task.kind != "classification":
        raise InputError(f"task.class_weights: for classification; {task.name} is one of {task.kind} here")
    count = len(task.label_names)
    if wanted == "balanced":
        if task.streams:
            raise InputError("task.class_weights: the classes of a stream are not counted; give a list")
        from sklearn.utils.class_weight import compute_class_weight

        labels = task.parts["train"].labels.numpy()
        present = np.unique(labels)
        weights = np.ones(count)  # a class without a row has no say, whatever it weighs
        weights[present] = compute_class_weight("balanced", classes=present, y=labels)
        return weights.tolist()
    numbers = isinstance(wanted, list) and all(
        isinstance(w, int | float) and not isinstance(w, bool) and w > 0 for w in wanted
    )
    if not numbers or len(wanted) != count:
        raise InputError(f"task.class_weights: expected 'balanced' or {count} numbers > 0, found {wanted!r}")
    return [float(weight) for weight in wanted]


__all__ = ["TASKS", "Part", "TaskData", "load_task"]
