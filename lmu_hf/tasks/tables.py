"""Time series out of tables with a column per step, tables with a row per step, and NumPy's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .base import PARTS, column, part_of

OTHERS = "others"


def step_columns(found: list[str], wanted: list[str] | str, answers: dict[str, str]) -> list[str]:
    """The columns that hold numbers of a signal.

    Args:
        found: columns of the table.
        wanted: their names, or "others" for all but the answers.
        answers: what is wanted -> name of its column.

    Raises:
        InputError: one is missing, or there is none.
    """
    names = [name for name in found if name not in answers.values()] if wanted == OTHERS else wanted
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"task.signal_columns: expected a list of column names or {OTHERS!r}, found {names!r}")
    if missing := [name for name in names if name not in found]:
        raise InputError(f"task.signal_columns: no column {missing[0]!r}, found {found[:20]}")
    return names


def trimmed(cells: list[Any]) -> list[Any]:
    """The cells of a row up to the last that is not empty."""
    end = len(cells)
    while end and (cells[end - 1] is None or cells[end - 1] != cells[end - 1]):
        end -= 1
    return cells[:end]


def gather_channels(
    tables: dict[str, Any], wanted: list[str] | str, answers: dict[str, str], data: str
) -> dict[str, dict[str, list[Any]]]:
    """Signals of a table with one series per row and one step per column."""
    parts = {}
    for part, table in _parts(tables, data):
        names = step_columns(table.column_names, wanted, answers)
        steps = zip(*(table[name] for name in names), strict=True)
        parts[part] = {
            "signal": [trimmed(list(row)) for row in steps],
            **{what: list(column(table, part, name, what)) for what, name in answers.items()},
        }
    return parts


def gather_steps(
    tables: dict[str, Any], series: str, wanted: list[str] | str | None, answers: dict[str, str], data: str
) -> dict[str, dict[str, list[Any]]]:
    """Signals of a table with one step per row: rows of the same series are its steps, in their order."""
    if wanted is None:
        raise InputError(f"task.signal_columns: expected the channels, a list of columns or {OTHERS!r}, found none")
    parts = {}
    for part, table in _parts(tables, data):
        ids = list(column(table, part, series, "series"))
        names = step_columns(table.column_names, wanted, {**answers, "series": series})
        rows: dict[Any, list[int]] = {}
        for index, name in enumerate(ids):
            rows.setdefault(name, []).append(index)
        steps = list(zip(*(table[name] for name in names), strict=True))
        cells: dict[str, list[Any]] = {"signal": [[list(steps[i]) for i in indices] for indices in rows.values()]}
        for what, name in answers.items():
            found = list(column(table, part, name, what))
            for series_id, indices in rows.items():
                if odd := next((i for i in indices if found[i] != found[indices[0]]), None):
                    raise InputError(
                        f"{part} row {odd}: expected one {what} per series, found {found[odd]!r} after {found[indices[0]]!r} in "
                        f"{series_id!r}"
                    )
            cells[what] = [found[indices[0]] for indices in rows.values()]
        parts[part] = cells
    return parts


def _parts(tables: dict[str, Any], data: str) -> list[tuple[str, Any]]:
    if "train" not in tables:
        raise InputError(f"data: expected a train part, found {sorted(tables)} in {data}")
    return [(part, tables[part]) for part in PARTS if part in tables]


def load_arrays(data: str, wanted: dict[str, str]) -> dict[str, dict[str, list[Any]]] | None:
    """Arrays of NumPy, whose first axis counts the rows.

    Args:
        data: an .npz file, or a folder of train*.npz, validation*.npz, test*.npz, each with an array per name; or of
            train_NAME.npy and so on.
        wanted: what -> name of its array.

    Returns:
        Part -> what -> rows; None if there are no such files.

    Raises:
        InputError: a file or an array is missing or damaged, or they have different numbers of rows.
    """
    path = Path(data)
    files = [path] if path.is_file() else sorted(path.glob("*.np[yz]")) if path.is_dir() else []
    files = [file for file in files if file.suffix in (".npz", ".npy")]
    parts: dict[str, dict[str, list[Any]]] = {}
    for file in files:
        part = "train" if path.is_file() else part_of(file.name)
        if part is None:
            raise InputError(f"data: {file.name} should begin with train, validation or test to say which part it is")
        arrays = _arrays(file)
        for what, name in wanted.items():
            if file.suffix == ".npz" and name not in arrays:
                raise InputError(f"data: no array {name!r} for the {what} in {file.name}, found {sorted(arrays)}")
            if name in arrays:
                parts.setdefault(part, {}).setdefault(what, []).extend(arrays[name])
    if not files:
        return None
    if "train" not in parts:
        raise InputError(f"data: expected a train part with {sorted(wanted.values())}, found {sorted(parts)} in {data}")
    for part, cells in parts.items():
        if missing := [name for what, name in wanted.items() if what not in cells]:
            raise InputError(f"data: expected {part}_{missing[0]}.npy in {data}, found none")
        counts = {wanted[what]: len(rows) for what, rows in cells.items()}
        if len(set(counts.values())) > 1:
            raise InputError(f"data: expected equally many rows in the arrays of the {part} part, found {counts}")
    return parts


def _arrays(file: Path) -> dict[str, list[Any]]:
    try:
        loaded = np.load(file, allow_pickle=False)
        arrays = {file.stem.rpartition("_")[2]: loaded} if file.suffix == ".npy" else dict(loaded)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"data: {file.name} could not be read as arrays of NumPy: {error}") from error
    # Labels become numbers and texts of Python, which is what tables give.
    return {name: array.tolist() if array.ndim == 1 else list(array) for name, array in arrays.items() if array.ndim}
