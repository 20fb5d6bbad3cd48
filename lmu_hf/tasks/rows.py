"""Rows of a table, for tasks that take any table: columns, labels, values, and the split where none is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .base import PARTS, check_labels, column

SPLIT_SEEDS = 2**32


def check_split_seed(split_seed: Any) -> None:
    """Raises InputError if it is no seed."""
    if isinstance(split_seed, bool) or not isinstance(split_seed, int) or not 0 <= split_seed < SPLIT_SEEDS:
        raise InputError(f"task.split_seed: expected a whole number within 0..{SPLIT_SEEDS - 1}, found {split_seed!r}")


def columns(tables: dict[str, Any], names: dict[str, str], data: str) -> dict[str, dict[str, list[Any]]]:
    """The wanted columns of every part, as lists.

    Args:
        tables: part -> table.
        names: what is wanted, such as "label" -> name of its column.
        data: where they come from, for messages.

    Raises:
        InputError: there is no training part, or no such column.
    """
    if "train" not in tables:
        raise InputError(f"data: expected a train part, found {sorted(tables)} in {data}")
    return {
        part: {wanted: list(column(tables[part], part, name, wanted)) for wanted, name in names.items()}
        for part in PARTS
        if part in tables
    }


def label_names(feature: Any, labels: Sequence[Any]) -> list[str]:
    """Names of the classes: those of the dataset, or those that occur in the training part.

    Args:
        feature: the column's type; one with ``names`` knows its classes.
        labels: of the training part.

    Raises:
        InputError: labels are neither names nor whole numbers from 0 without gaps.
    """
    if odd := [label for label in labels if not isinstance(label, int | str) or isinstance(label, bool)]:
        raise InputError(f"train: expected labels that are names or whole numbers, found {odd[0]!r}")
    if hasattr(feature, "names"):
        return list(feature.names)
    if all(isinstance(label, str) for label in labels):
        return sorted(set(labels))
    # Whole numbers: classes without an example in between would only hide a mistake in the data.
    found = sorted(set(labels), key=lambda label: (str(type(label)), label))
    if found != list(range(len(found))):
        raise InputError(f"train: expected names or labels 0 .. n-1 without gaps, found {found[:10]}")
    return [str(label) for label in found]


def encode(part: str, labels: Sequence[Any], names: list[str]) -> list[int]:
    """Labels as classes.

    Raises:
        InputError: one does not occur in the training part.
    """
    if not all(isinstance(label, str) for label in labels):
        return check_labels(part, labels, len(names))
    classes = {name: index for index, name in enumerate(names)}
    for index, label in enumerate(labels):
        if label not in classes:
            raise InputError(f"{part} row {index}: label {label!r} does not occur in the training part, which has {names}")
    return [classes[label] for label in labels]


def values(part: str, rows: Iterable[Any]) -> np.ndarray:
    """Targets of a regression as float32 (rows, targets): each row a number, or equally many.

    Raises:
        InputError: a row holds none, or another number of them.
    """
    found: list[np.ndarray] = []
    for index, row in enumerate(rows):
        try:
            value = np.atleast_1d(np.asarray(row, dtype=np.float32))
        except (TypeError, ValueError):
            value = np.full(0, np.nan, np.float32)
        if value.ndim != 1 or not value.size or not np.isfinite(value).all():
            raise InputError(
                f"{part} row {index}: expected a number or a list of numbers as target, found {str(row)[:60]!r}"
            )
        if found and len(value) != len(found[0]):
            raise InputError(f"{part} row {index}: expected {len(found[0])} targets as in row 0, found {len(value)}")
        found.append(value)
    return np.stack(found)


def split(parts: dict[str, dict[str, list[Any]]], seed: int, stratify: str | None) -> str:
    """Splits a tenth of the training rows off for validation and test part where they are missing, in place.

    Args:
        parts: part -> columns, of which "train" is there.
        seed: of the split.
        stratify: column whose values all parts hold in like shares; None for none.

    Returns:
        How it was split, for the record.

    Raises:
        InputError: there are too few rows.
    """
    from sklearn.model_selection import train_test_split

    missing = [part for part in PARTS[1:] if part not in parts]
    for part in missing:
        train = parts["train"]
        rows = range(len(next(iter(train.values()))))
        by_label = None if stratify is None else train[stratify]
        try:
            kept, taken = train_test_split(rows, test_size=0.1, random_state=seed, stratify=by_label)
        except ValueError as error:
            with_all = "" if stratify is None else " with every label in it"
            raise InputError(f"train: too few rows to split off a tenth{with_all} ({error})") from error
        parts[part] = {name: [cells[i] for i in taken] for name, cells in train.items()}
        parts["train"] = {name: [cells[i] for i in kept] for name, cells in train.items()}
    how = "a tenth" if stratify is None else "a stratified tenth"
    return f"{how} of the training rows for each missing part, seed {seed}" if missing else "as given"
