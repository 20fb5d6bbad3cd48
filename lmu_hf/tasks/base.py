"""What all tasks give to training: processed sequences with labels, in three parts that never mix."""

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


class Part(torch.utils.data.Dataset):
    """Processed sequences (time, features) with one label each, held in memory.

    Args:
        values: one array (rows, time, features), or a list of arrays (time, features) of different lengths.
        labels: class per row.
    """

    def __init__(self, values: np.ndarray | Sequence[np.ndarray], labels: Sequence[int]):
        self.values = [torch.from_numpy(np.ascontiguousarray(value)) for value in values]
        self.labels = torch.as_tensor(np.asarray(labels, dtype=np.int64))
        assert len(self.values) == len(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_values": self.values[index], "labels": self.labels[index]}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Stacks rows into a batch; rows of different lengths are padded behind their end and get an ``attention_mask``."""
    values = [row["input_values"] for row in rows]
    batch = {"labels": torch.stack([row["labels"] for row in rows])}
    lengths = torch.tensor([len(value) for value in values])
    if bool((lengths == lengths[0]).all()):
        return {"input_values": torch.stack(values), **batch}
    padded = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).to(torch.int64)
    return {"input_values": padded, "attention_mask": mask, **batch}


@dataclass
class TaskData:
    """A loaded task.

    Attributes:
        name: of the task.
        parts: "train", "validation" and "test".
        processor: what turned the raw data into sequences; saved with the model.
        label_names: name of each class.
        dataset: facts for the record: name, source, size of each part, how it was split. No local paths.
        input_size: features per time step.
    """

    name: str
    parts: dict[str, Part]
    processor: Processor
    label_names: list[str]
    dataset: dict[str, Any] = field(default_factory=dict)

    @property
    def input_size(self) -> int:
        return self.parts["train"].values[0].shape[-1]


def process(name: str, rows: Iterable[Any], convert: Callable[[Any], np.ndarray]) -> list[np.ndarray]:
    """Converts every row, naming the part and the row in an error."""
    converted = []
    for index, row in enumerate(rows):
        try:
            converted.append(convert(row))
        except (ValueError, TypeError) as error:
            raise InputError(f"{name} row {index}: {error}") from error
    return converted


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


def load_tables(data: str, task: str, extensions: Sequence[str] = (".parquet",)) -> dict[str, Dataset]:
    """Loads the tables of a local file or folder, or of a dataset on the Hub.

    Files in a folder belong to the part whose name (train, validation or val, test) their own begins with; a file by itself
    is "train".

    Args:
        data: path or id.
        task: name of the task, for messages.
        extensions: file name endings to look for.

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
            return dict(load_dataset(data))
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
        part = "train" if path.is_file() else _part_of(file.name)
        if part is None:
            raise InputError(f"data: {file.name} should begin with train, validation or test to say which part it is")
        parts.setdefault(part, []).append(str(file))
    kind = {".parquet": "parquet", ".csv": "csv"}.get(files[0].suffix, "json")
    try:
        tables = dict(load_dataset(kind, data_files=parts))
    except Exception as error:  # the readers raise many kinds; each means that the file is not what it says
        raise InputError(f"data: {data} could not be read as {kind}: {first_line(error.__cause__ or error)}") from error
    if empty := [part for part, table in tables.items() if len(table) == 0]:
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


def _part_of(file_name: str) -> str | None:
    for prefix, part in (("train", "train"), ("val", "validation"), ("test", "test")):
        if file_name.lower().startswith(prefix):
            return part
    return None
