"""Classification of time series from local tables: rows of a signal and a label, lengths free."""

from typing import Any

import numpy as np

from ..errors import InputError
from ..model.processing_lmu import LMUFeatureExtractor, check_finite
from .base import PARTS, Part, TaskData, check_labels, check_processor, column, load_tables, process

OPTIONS = ("signal_column", "label_column", "split_seed", "sampling_rate")


def load(
    data: str | None = None,
    processor: Any = None,
    signal_column: str = "signal",
    label_column: str = "label",
    split_seed: int = 0,
    sampling_rate: int = 1,
) -> TaskData:
    """Loads the task.

    Each signal is a list of numbers, or a list of steps of equally many numbers. Labels are whole numbers from 0 or names.
    Scaling is fitted on the training part. Where validation or test part is missing, a tenth of the training rows is split
    off for it, stratified by label.

    Args:
        data: a .parquet or .jsonl file, a folder of train*, validation*, test* files, or an id on the Hub.
        processor: that of a trained model; fitted to the training part when None.
        signal_column: name of the column of signals.
        label_column: name of the column of labels.
        split_seed: seed of a split.
        sampling_rate: samples per second, stored with the model.
    """
    if isinstance(split_seed, bool) or not isinstance(split_seed, int) or not 0 <= split_seed < 2**32:
        raise InputError(f"task.split_seed: expected a whole number within 0..{2**32 - 1}, found {split_seed!r}")
    if data is None:
        raise InputError("data: expected --data with a .parquet or .jsonl file, a folder of these, or an id on the Hub")
    tables = load_tables(data, "signals", (".parquet", ".jsonl", ".json"))
    if "train" not in tables:
        raise InputError(f"data: expected a train part, found {sorted(tables)} in {data}")
    raw = {
        part: (
            list(column(tables[part], part, signal_column, "signal")),
            list(column(tables[part], part, label_column, "label")),
        )
        for part in PARTS
        if part in tables
    }
    names = _label_names(tables["train"], label_column, raw["train"][1])
    labels = {part: _encode(part, values, names) for part, (_, values) in raw.items()}
    signals = {part: process(part, values, _as_array) for part, (values, _) in raw.items()}
    split = "as given"
    for part in PARTS[1:]:
        if part not in signals:
            split = f"a stratified tenth of the training rows for each missing part, seed {split_seed}"
            kept, taken = _split(labels["train"], split_seed)
            signals[part] = [signals["train"][i] for i in taken]
            labels[part] = [labels["train"][i] for i in taken]
            signals["train"] = [signals["train"][i] for i in kept]
            labels["train"] = [labels["train"][i] for i in kept]
    channels = {signal.shape[1] for signal in signals["train"]}
    if len(channels) > 1:
        raise InputError(f"train: expected signals with equally many channels, found {sorted(channels)}")
    if processor is None:
        try:
            processor = LMUFeatureExtractor.fit(signals["train"], sampling_rate=sampling_rate)
        except ValueError as error:
            raise InputError(f"task.{error}") from error
    check_processor(processor, LMUFeatureExtractor)
    parts = {part: Part(process(part, signals[part], processor.sequence), labels[part]) for part in PARTS}
    return TaskData(
        name="signals",
        parts=parts,
        processor=processor,
        label_names=names,
        dataset={
            "name": "time series",
            "id": None,
            "split": split,
            "rows": {name: len(part) for name, part in parts.items()},
        },
    )


def _as_array(signal: Any) -> np.ndarray:
    array = np.asarray(signal, dtype=np.float32)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"expected a signal of numbers or of equally long steps, found the shape {array.shape}")
    check_finite(array)
    return array


def _label_names(table: Any, label_column: str, labels: list[Any]) -> list[str]:
    feature = table.features[label_column]
    if odd := [label for label in labels if not isinstance(label, int | str)]:
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


def _encode(part: str, labels: list[Any], names: list[str]) -> list[int]:
    if not all(isinstance(label, str) for label in labels):
        return check_labels(part, labels, len(names))
    for index, label in enumerate(labels):
        if label not in names:
            raise InputError(f"{part} row {index}: label {label!r} does not occur in the training part, which has {names}")
    return [names.index(label) for label in labels]


def _split(labels: list[int], seed: int) -> tuple[list[int], list[int]]:
    from sklearn.model_selection import train_test_split

    try:
        kept, taken = train_test_split(range(len(labels)), test_size=0.1, random_state=seed, stratify=labels)
    except ValueError as error:
        raise InputError(f"train: too few rows to split off a tenth with every label in it ({error})") from error
    return kept, taken
