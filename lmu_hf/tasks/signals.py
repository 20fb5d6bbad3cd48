"""Time series of free lengths from any table or array: a class, or values, for each."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError
from ..model.processing_lmu import LMUFeatureExtractor, check_finite
from .base import PARTS, Part, TaskData, check_processor, load_tables, process
from .rows import check_split_seed, columns, encode, label_names, split, values
from .tables import gather_channels, gather_steps, load_arrays

OPTIONS = (
    "signal_column",
    "signal_columns",
    "series_column",
    "label_column",
    "target_column",
    "split_seed",
    "sampling_rate",
    "mean",
    "std",
    "streaming",
    "sample_rows",
    "shuffle_rows",
    "labels",
)
EXTENSIONS = (".parquet", ".csv", ".jsonl", ".json")


def load(
    data: str | None = None,
    processor: Any = None,
    signal_column: str = "signal",
    signal_columns: list[str] | str | None = None,
    series_column: str | None = None,
    label_column: str = "label",
    target_column: str | list[str] | None = None,
    split_seed: int = 0,
    sampling_rate: int = 1,
    mean: float | list[float] | None = None,
    std: float | list[float] | None = None,
    streaming: bool = False,
    sample_rows: int = 1000,
    shuffle_rows: int = 1000,
    labels: list[str] | None = None,
) -> TaskData:
    """Loads the task.

    A table has one series per row or one step per row:

    - ``signal_column`` names a column of lists of numbers, or of lists of steps of equally many numbers;
    - ``signal_columns`` names the columns with one step each, in order, or is "others" for all but labels and targets; empty
      cells at the end of a row make its series shorter;
    - ``series_column`` names the column that says which series a step belongs to, and ``signal_columns`` the channels. Steps
      are in the order of the rows; the label of a series is that of its first step, and all must be the same.

    Labels are whole numbers from 0 or names. With ``target_column`` the model learns values instead. Scaling is fitted on the
    training part. Where validation or test part is missing, a tenth of the training rows is split off for it, stratified by
    label.

    Args:
        data: a .parquet, .csv, .jsonl, .json or .npz file; a folder of such files, or of pairs like train_signal.npy and
            train_label.npy, whose names begin with train, validation or test; or an id on the Hub.
        processor: that of a trained model; fitted to the training part when None.
        signal_column: column, or array, of signals.
        signal_columns: columns of steps or of channels, see above.
        series_column: column of the series' names, for tables with a row per step.
        label_column: column, or array, of labels.
        target_column: column or columns, or array, of values to learn; labels are not read then.
        split_seed: seed of a split.
        sampling_rate: samples per second, stored with the model.
        mean: subtracted from the signals, a number or one per channel; fitted when None.
        std: divided by after that; fitted when None.
        streaming: read the rows as they are needed, for sets larger than memory; needs training.max_steps and a validation and a
            test part.
        sample_rows: of a stream, how many of its first rows scaling is fitted on and labels are looked for in.
        shuffle_rows: of a stream, how many rows are shuffled at a time.
        labels: names of the classes, for a stream whose first rows do not hold them all.

    Raises:
        InputError: the data or an option is wrong.
    """
    check_split_seed(split_seed)
    if data is None:
        raise InputError(
            f"data: expected --data with a file ({', '.join((*EXTENSIONS, '.npz'))}), a folder of these, or an id on the Hub"
        )
    if (mean is None) != (std is None):
        raise InputError("task.mean and task.std: expected both or none")
    targets = [target_column] if isinstance(target_column, str) else target_column
    answers = {"label": label_column} if targets is None else {f"target {name}": name for name in targets}
    if streaming:
        from .streams import load_stream

        if series_column is not None:
            raise InputError("task.series_column: a stream needs one series per row; leave out task.streaming")
        return load_stream(
            data,
            processor,
            signal_column=signal_column,
            signal_columns=signal_columns,
            answers=answers,
            targets=targets,
            sampling_rate=sampling_rate,
            scale=None if mean is None else (mean, std),
            sample_rows=sample_rows,
            shuffle_rows=shuffle_rows,
            labels=labels,
            seed=split_seed,
        )
    parts, feature = _read(data, signal_column, signal_columns, series_column, answers)
    for part, cells in parts.items():
        cells["signal"] = process(part, cells["signal"], as_array)
    if targets is None:
        names = label_names(feature, parts["train"]["label"])
        for part, cells in parts.items():
            cells["label"] = encode(part, cells["label"], names)
    how = split(parts, split_seed, "label" if targets is None else None)
    channels = {signal.shape[1] for signal in parts["train"]["signal"]}
    if len(channels) > 1:
        raise InputError(f"train: expected signals with equally many channels, found {sorted(channels)}")
    if processor is None:
        processor = make_processor(parts["train"]["signal"], sampling_rate, None if mean is None else (mean, std))
    check_processor(processor, LMUFeatureExtractor)
    if targets is None:
        wanted: dict[str, Any] = {part: cells["label"] for part, cells in parts.items()}
    else:
        wanted = {part: join_targets(part, cells, answers) for part, cells in parts.items()}
        names = target_names(targets, wanted["train"].shape[1])
    made = {part: Part(process(part, parts[part]["signal"], processor.sequence), wanted[part]) for part in PARTS}
    return TaskData(
        name="signals",
        parts=made,
        processor=processor,
        label_names=names,
        dataset={"name": "time series", "id": None, "split": how, "rows": {name: len(part) for name, part in made.items()}},
        kind="classification" if targets is None else "regression",
    )


def _read(
    data: str, signal_column: str, signal_columns: list[str] | str | None, series_column: str | None, answers: dict[str, str]
) -> tuple[dict[str, dict[str, list[Any]]], Any]:
    """The columns "signal" and those of the answers, per part, and the type of the labels."""
    wanted = {"signal": signal_column, **answers}
    arrays = load_arrays(data, wanted)
    if arrays is not None:
        return arrays, None
    tables = load_tables(data, "signals", EXTENSIONS)
    if series_column is not None:
        parts = gather_steps(tables, series_column, signal_columns, answers, data)
    elif signal_columns is not None:
        parts = gather_channels(tables, signal_columns, answers, data)
    else:
        parts = columns(tables, wanted, data)
    return parts, tables["train"].features.get(answers.get("label"))


def make_processor(signals: list[np.ndarray], sampling_rate: int, scale: Any) -> LMUFeatureExtractor:
    """A feature extractor with the given mean and std, or with those of the signals."""
    try:
        if scale is None:
            return LMUFeatureExtractor.fit(signals, sampling_rate=sampling_rate)
        return LMUFeatureExtractor(
            feature_size=signals[0].shape[1], mean=scale[0], std=scale[1], sampling_rate=sampling_rate
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"task.{error}") from error


def join_targets(part: str, cells: dict[str, list[Any]], answers: dict[str, str]) -> np.ndarray:
    """The columns of targets side by side: (rows, targets)."""
    return np.concatenate([values(part, cells[name]) for name in answers], axis=1)


def target_names(targets: list[str], count: int) -> list[str]:
    """A name per value: those of the columns, numbered where one column holds several."""
    return targets if len(targets) == count else [f"{'+'.join(targets)}[{i}]" for i in range(count)]


def as_array(signal: Any) -> np.ndarray:
    """A signal as float32 (time, channels).

    Raises:
        ValueError: it is empty, ragged, or not finite.
    """
    array = np.asarray(signal, dtype=np.float32)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"expected a signal of numbers or of equally long steps, found the shape {array.shape}")
    check_finite(array)
    return array
