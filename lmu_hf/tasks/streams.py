"""Time series that are read as they are needed, for sets larger than memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..model.processing_lmu import LMUFeatureExtractor
from .base import PARTS, TaskData, check_processor, load_tables
from .rows import encode, label_names, values
from .signals import EXTENSIONS, as_array, make_processor, target_names
from .tables import step_columns, trimmed


class StreamPart(torch.utils.data.IterableDataset):
    """Rows of a stream, converted one by one.

    Args:
        rows: of a table, an ``IterableDataset`` of datasets.
        convert: a row, with its number for messages, to what a model takes.
    """

    def __init__(self, rows: Any, convert: Callable[[int, dict[str, Any]], dict[str, torch.Tensor]]):
        self.rows = rows
        self.convert = convert

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for index, row in enumerate(self.rows):
            yield self.convert(index, row)

    def set_epoch(self, epoch: int) -> None:
        """Shuffles the rows of this epoch in another way than those of the others."""
        self.rows.set_epoch(epoch)


def load_stream(
    data: str,
    processor: Any,
    *,
    signal_column: str,
    signal_columns: list[str] | str | None,
    answers: dict[str, str],
    targets: list[str] | None,
    sampling_rate: int,
    scale: Any,
    sample_rows: int,
    shuffle_rows: int,
    labels: list[str] | None,
    seed: int,
) -> TaskData:
    """Loads the signals task without holding it in memory; the arguments are those of :func:`lmu_hf.tasks.signals.load`.

    Args:
        answers: what is wanted -> name of its column.
        targets: columns of values to learn; None for classes.
        scale: mean and std; None to fit them on the first rows.
        seed: of the order of the rows.

    Raises:
        InputError: the data or an option is wrong.
    """
    for name, value in (("sample_rows", sample_rows), ("shuffle_rows", shuffle_rows)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"task.{name}: expected a whole number >= 1, found {value!r}")
    tables = load_tables(data, "signals", EXTENSIONS, streaming=True)
    if missing := [part for part in PARTS if part not in tables]:
        raise InputError(f"data: a stream cannot be split; expected train, validation and test, found no {missing[0]} part")
    first = list(islice(tables["train"], sample_rows))
    if not first:
        raise InputError(f"data: expected at least one row, found none in the train part of {data}")
    found = list(first[0])
    steps = None if signal_columns is None else step_columns(found, signal_columns, answers)
    for wanted, name in {**({} if steps else {"signal": signal_column}), **answers}.items():
        if name not in found:
            raise InputError(
                f"train: no column {name!r} for the {wanted}, found {found}; name it with task.{wanted}_column=..."
            )

    def signal(part: str, index: int, row: dict[str, Any]) -> np.ndarray:
        try:
            return as_array(row[signal_column] if steps is None else trimmed([row[name] for name in steps]))
        except (ValueError, TypeError) as error:
            raise InputError(f"{part} row {index}: {error}") from error

    if targets is None:
        feature = (tables["train"].features or {}).get(answers["label"])
        names = list(labels) if labels is not None else label_names(feature, [row[answers["label"]] for row in first])
    if processor is None:
        processor = make_processor([signal("train", i, row) for i, row in enumerate(first)], sampling_rate, scale)
    check_processor(processor, LMUFeatureExtractor)

    def answer(part: str, index: int, row: dict[str, Any]) -> torch.Tensor:
        try:
            if targets is None:
                return torch.tensor(encode(part, [row[answers["label"]]], names)[0])
            return torch.from_numpy(np.concatenate([values(part, [row[name]])[0] for name in targets]))
        except InputError as error:
            # It names the first row of what it was given, which is this one.
            raise InputError(str(error).replace("row 0", f"row {index}", 1)) from error

    def converter(part: str) -> Callable[[int, dict[str, Any]], dict[str, torch.Tensor]]:
        def convert(index: int, row: dict[str, Any]) -> dict[str, torch.Tensor]:
            array = signal(part, index, row)
            try:
                sequence = processor.sequence(array)
            except ValueError as error:
                raise InputError(f"{part} row {index}: {error}") from error
            return {"input_values": torch.from_numpy(sequence), "labels": answer(part, index, row)}

        return convert

    if targets is not None:
        names = target_names(targets, len(answer("train", 0, first[0])))
    shuffled = {**tables, "train": tables["train"].shuffle(seed=seed, buffer_size=shuffle_rows)}
    return TaskData(
        name="signals",
        parts={part: StreamPart(shuffled[part], converter(part)) for part in PARTS},
        processor=processor,
        label_names=names,
        dataset={
            "name": "time series",
            "id": None,
            "split": "as given",
            "streamed": {"scaled by": "given values" if scale is not None else f"the first {len(first)} training rows"},
            "rows": {},
        },
        kind="classification" if targets is None else "regression",
        features=processor.feature_size,
    )
