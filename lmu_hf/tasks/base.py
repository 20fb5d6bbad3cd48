"""What all tasks give to training: processed sequences with what is wanted of them, in three parts that never mix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import InputError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

    from ..model.processing_lmu import LMUFeatureExtractor, LMUImageProcessor

    Processor = LMUImageProcessor | LMUFeatureExtractor

PARTS = ("train", "validation", "test")
KINDS = ("classification", "regression", "series")


class Part(torch.utils.data.Dataset):
    """Processed sequences (time, features) with what is wanted of each, held in memory.

    Args:
        values: one array (rows, time, features), or a list of arrays (time, features) of different lengths.
        labels: per row a class; or, as floats, values (rows, targets); or a list of arrays (time, targets), NaN where a value
            is not known.
    """

    def __init__(self, values: np.ndarray | Sequence[np.ndarray], labels: Sequence[Any] | np.ndarray):
        self.values = [torch.from_numpy(np.ascontiguousarray(value)) for value in values]
        self.labels: torch.Tensor | list[torch.Tensor]
        if len(labels) and np.ndim(labels[0]) == 2:
            self.labels = [torch.from_numpy(np.ascontiguousarray(label, dtype=np.float32)) for label in labels]
            assert all(len(value) == len(label) for value, label in zip(self.values, self.labels, strict=True))
        elif np.ndim(labels) == 2:
            self.labels = torch.as_tensor(np.asarray(labels, dtype=np.float32))
        else:
            self.labels = torch.as_tensor(np.asarray(labels, dtype=np.int64))
        assert len(self.values) == len(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_values": self.values[index], "labels": self.labels[index]}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stacks rows into a batch.

    Rows of different lengths are padded behind their end and get an ``attention_mask``; values wanted of padded steps are NaN.
    """
    name = "input_ids" if "input_ids" in rows[0] else "input_values"
    values, labels = [row[name] for row in rows], [row["labels"] for row in rows]
    lengths = torch.tensor([len(value) for value in values])
    if bool((lengths == lengths[0]).all()):
        return {name: torch.stack(values), "labels": torch.stack(labels)}
    pad = torch.nn.utils.rnn.pad_sequence
    padded = pad(values, batch_first=True)
    return {
        name: padded,
        "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).to(torch.int64),
        "labels": pad(labels, batch_first=True, padding_value=torch.nan) if labels[0].ndim == 2 else torch.stack(labels),
    }


@dataclass
class TaskData:
    """A loaded task.

    Attributes:
        name: of the task.
        parts: "train", "validation" and "test".
        processor: what turned the raw data into sequences; saved with the model.
        label_names: name of each class, or of each value that is wanted.
        dataset: facts for the record: name, source, size of each part, how it was split, and for values their unit. No local
            paths.
        kind: one of ``KINDS``: a class per sequence, values per sequence, or values at every step.
        fields: fields of the model's configuration that the task decides, such as ``horizon``.
        predicts_input: of a series, whether what is wanted is the series itself at other steps.
        every: of a series, every how many steps make a readable picture.
        class_weights: what a row of each class counts in the loss; None for all the same.
        features: per time step, where no part is held in memory.
        input_size: features per time step; None for tokens.
    """

    name: str
    parts: dict[str, Any]
    processor: Any
    label_names: list[str]
    dataset: dict[str, Any] = field(default_factory=dict)
    kind: str = "classification"
    fields: dict[str, Any] = field(default_factory=dict)
    predicts_input: bool = False
    every: int = 1
    class_weights: list[float] | None = None
    features: int | None = None

    @property
    def input_size(self) -> int | None:
        if "vocab_size" in self.fields or self.features is not None:
            return self.features
        return self.parts["train"].values[0].shape[-1]

    @property
    def streams(self) -> bool:
        """Whether the rows are read as they are needed."""
        return isinstance(self.parts["train"], torch.utils.data.IterableDataset)

    def training(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings that the task needs unless the experiment has others.

        Raises:
            InputError: the task needs a setting that only the experiment can give.
        """
        if not self.streams:
            return {}
        steps = settings.get("max_steps", -1)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise InputError(f"training.max_steps: expected a whole number of steps >= 1 for a stream, found {steps!r}")
        every = max(1, steps // 10)
        strategies = {f"{name}_strategy": "steps" for name in ("eval", "save", "logging")}
        return {**strategies, "eval_steps": every, "save_steps": every, "logging_steps": every}


def process(name: str, rows: Iterable[Any], convert: Callable[[Any], np.ndarray]) -> list[np.ndarray]:
    """Converts every row, naming the part and the row in an error."""
    converted = []
    for index, row in enumerate(rows):
        try:
            converted.append(convert(row))
        except (ValueError, TypeError) as error:
            raise InputError(f"{name} row {index}: {error}") from error
    return converted


def check_whole(name: str, value: Any, smallest: int, largest: int | None = None) -> None:
    """Raises InputError if a value is no whole number within the bounds."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < smallest
        or (largest is not None and value > largest)
    ):
        bounds = f">= {smallest}" if largest is None else f"within {smallest}..{largest}"
        raise InputError(f"{name}: expected a whole number {bounds}, found {value!r}")


def check_processor(processor: Any, kind: type) -> None:
    """Raises InputError if the processor of a model is not one for this kind of data."""
    if not isinstance(processor, kind):
        raise InputError(f"model: this task needs a {kind.__name__}, the model comes with a {type(processor).__name__}")


def check_labels(name: str, labels: Iterable[Any], count: int) -> list[int]:
    """Returns the labels as whole numbers; raises InputError at the first outside 0 .. count-1."""
    checked = []
    for index, label in enumerate(labels):
        if isinstance(label, bool) or not isinstance(label, int | np.integer) or not 0 <= label < count:
            raise InputError(f"{name} row {index}: expected a label within 0..{count - 1}, found {label!r}")
        checked.append(int(label))
    return checked


def load_tables(
    data: str, task: str, extensions: Sequence[str] = (".parquet",), streaming: bool = False
) -> dict[str, Dataset]:
    """Loads the tables of a local file or folder, or of a dataset on the Hub.

    Files in a folder belong to the part whose name (train, validation or val, test) their own begins with; a file by itself
    is "train".

    Args:
        data: path or id.
        task: name of the task, for messages.
        extensions: file name endings to look for.
        streaming: give tables that are read as they are needed.

    Returns:
        Part -> table, for the parts that there are.

    Raises:
        InputError: there is no such file, folder or dataset, or it cannot be read.
    """
    from datasets import load_dataset

    path = Path(data)
    if not path.exists():
        if not _is_hub_id(data):
            raise InputError(f"data: no file or folder {data}")
        try:
            return dict(load_dataset(data, streaming=streaming))
        except Exception as error:  # the Hub client raises many kinds; each means that there is no data
            reason = first_line(error)
            raise InputError(
                f"data: {data} is no local file or folder and could not be loaded from the Hub ({reason}); give a local copy "
                f"with --data"
            ) from error
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in extensions)
    if not files or any(file.suffix not in extensions for file in files):
        raise InputError(f"data: expected files ending in {' or '.join(extensions)} for {task}, found none in {data}")
    parts: dict[str, list[str]] = {}
    for file in files:
        part = "train" if path.is_file() else part_of(file.name)
        if part is None:
            raise InputError(f"data: {file.name} should begin with train, validation or test to say which part it is")
        parts.setdefault(part, []).append(str(file))
    kind = {".parquet": "parquet", ".csv": "csv"}.get(files[0].suffix, "json")
    try:
        tables = dict(load_dataset(kind, data_files=parts, streaming=streaming))
    except Exception as error:  # the readers raise many kinds; each means that the file is not what it says
        raise InputError(f"data: {data} could not be read as {kind}: {first_line(error.__cause__ or error)}") from error
    if empty := [part for part, table in tables.items() if not streaming and len(table) == 0]:
        raise InputError(f"data: expected at least one row, found none in the {empty[0]} part of {data}")
    return tables


def column(table: Dataset, part: str, name: str, wanted: str) -> Any:
    """One column of a table.

    Raises:
        InputError: there is none of that name.
    """
    if name not in table.column_names:
        raise InputError(
            f"{part}: no column {name!r} for the {wanted}, found {table.column_names}; name it with task.{wanted}_column=..."
        )
    return table[name]


def _is_hub_id(data: str) -> bool:
    owner, _, rest = data.partition("/")
    return bool(owner) and bool(rest) and "/" not in rest and not data.startswith((".", "~"))


def part_of(file_name: str) -> str | None:
    """The part that a file belongs to by its name; None if it says none."""
    for prefix, part in (("train", "train"), ("val", "validation"), ("test", "test")):
        if file_name.lower().startswith(prefix):
            return part
    return None
