"""Time series in every shape that tables and arrays have them, values to learn from them, and streams."""

import json

import numpy as np
import pytest
import torch

from lmu_hf.errors import InputError
from lmu_hf.experiment import Experiment
from lmu_hf.tasks import load_task
from lmu_hf.tasks.base import collate
from lmu_hf.training import train


def made(count, seed=0):
    """Signals of 5 to 11 steps with a class, and the mean of each as a value to learn."""
    rng = np.random.default_rng(seed)
    signals = [rng.normal(size=5 + index % 7).round(3) + 3 * (index % 2) for index in range(count)]
    return signals, [index % 2 for index in range(count)], [float(signal.mean()) for signal in signals]


def write_jsonl(path, count, seed=0):
    rows = zip(*made(count, seed), strict=True)
    path.write_text(
        "".join(json.dumps({"signal": x.tolist(), "label": y, "mean": z, "both": [z, -z]}) + "\n" for x, y, z in rows)
    )


def raw(task, part="train"):
    """The signals of a part as they were before scaling."""
    processor = task.processor
    return [value.numpy() * np.float32(processor.std) + np.float32(processor.mean) for value in task.parts[part].values]


def same_signals(found, expected):
    assert len(found) == len(expected)
    for signal in expected:
        assert any(len(other) == len(signal) and np.allclose(other[:, 0], signal, atol=1e-5) for other in found)


def test_a_column_per_step(tmp_path):
    signals, labels, _ = made(40)
    lines = ["kind," + ",".join(f"t{i}" for i in range(11))]
    for signal, label in zip(signals, labels, strict=True):
        lines.append(f"{'ab'[label]}," + ",".join([*map(str, signal), *[""] * (11 - len(signal))]))
    (tmp_path / "wide.csv").write_text("\n".join(lines) + "\n")
    task = load_task("signals", str(tmp_path / "wide.csv"), label_column="kind", signal_columns="others")
    assert task.label_names == ["a", "b"]
    found = [signal for part in task.parts for signal in raw(task, part)]
    same_signals(found, signals)
    with pytest.raises(InputError, match="no column 't99'"):
        load_task("signals", str(tmp_path / "wide.csv"), label_column="kind", signal_columns=["t0", "t99"])


def test_a_row_per_step(tmp_path):
    signals, labels, _ = made(40)
    lines = ["id,x,y,label"]
    for index, (signal, label) in enumerate(zip(signals, labels, strict=True)):
        lines += [f"s{index},{value},{-value},{label}" for value in signal]
    (tmp_path / "long.csv").write_text("\n".join(lines) + "\n")
    options = {"series_column": "id", "signal_columns": ["x", "y"]}
    task = load_task("signals", str(tmp_path / "long.csv"), **options)
    assert task.input_size == 2
    same_signals([signal for part in task.parts for signal in raw(task, part)], signals)
    with pytest.raises(InputError, match="expected the channels, a list of columns or 'others', found none"):
        load_task("signals", str(tmp_path / "long.csv"), series_column="id")
    (tmp_path / "long.csv").write_text("\n".join([*lines, "s0,1.0,1.0,1"]) + "\n")
    with pytest.raises(InputError, match="expected one label per series, found 1 after 0 in 's0'"):
        load_task("signals", str(tmp_path / "long.csv"), **options)


def test_arrays(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6, 2)), np.arange(40) % 4
    np.savez(tmp_path / "all.npz", signal=x, label=y)
    task = load_task("signals", str(tmp_path / "all.npz"))
    assert (task.input_size, task.label_names) == (2, ["0", "1", "2", "3"])
    (tmp_path / "parts").mkdir()
    for part in ("train", "val", "test"):
        np.save(tmp_path / "parts" / f"{part}_signal.npy", x)
        np.save(tmp_path / "parts" / f"{part}_label.npy", np.array(["a", "b"])[y % 2])
    task = load_task("signals", str(tmp_path / "parts"))
    assert task.dataset["rows"] == {"train": 40, "validation": 40, "test": 40}
    assert task.label_names == ["a", "b"]
    with pytest.raises(InputError, match="no array 'y' for the label in all.npz, found .'label', 'signal'."):
        load_task("signals", str(tmp_path / "all.npz"), label_column="y")
    np.save(tmp_path / "parts" / "test_label.npy", y[:3])
    with pytest.raises(InputError, match="expected equally many rows in the arrays of the test part"):
        load_task("signals", str(tmp_path / "parts"))
    (tmp_path / "all.npz").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="could not be read as arrays"):
        load_task("signals", str(tmp_path / "all.npz"))


def test_values_to_learn(tmp_path):
    write_jsonl(tmp_path / "data.jsonl", 60)
    task = load_task("signals", str(tmp_path / "data.jsonl"), target_column="mean")
    assert (task.kind, task.label_names) == ("regression", ["mean"])
    assert task.parts["train"].labels.shape == (48, 1)
    task = load_task("signals", str(tmp_path / "data.jsonl"), target_column=["mean", "both"])
    assert task.label_names == ["mean+both[0]", "mean+both[1]", "mean+both[2]"]
    labels = task.parts["test"].labels
    assert torch.equal(labels[:, 0], -labels[:, 2])
    with pytest.raises(InputError, match="class_weights: for classification"):
        load_task("signals", str(tmp_path / "data.jsonl"), target_column="mean", class_weights="balanced")
    with pytest.raises(InputError, match="no column 'x' for the target x"):
        load_task("signals", str(tmp_path / "data.jsonl"), target_column="x")


def test_streams(tmp_path):
    for seed, (part, count) in enumerate((("train", 60), ("validation", 20), ("test", 20))):
        write_jsonl(tmp_path / f"{part}.jsonl", count, seed)
    held = load_task("signals", str(tmp_path))
    task = load_task("signals", str(tmp_path), streaming=True, sample_rows=60)
    assert task.streams
    assert task.input_size == 1
    assert task.label_names == held.label_names
    assert task.processor.mean == pytest.approx(held.processor.mean)
    rows = list(task.parts["validation"])
    assert torch.equal(rows[3]["input_values"], held.parts["validation"].values[3])
    assert int(rows[3]["labels"]) == 1

    def order(epoch):
        task.parts["train"].set_epoch(epoch)
        return [tuple(row["input_values"].flatten().tolist()) for row in task.parts["train"]]

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert sorted(order(0)) == sorted(order(1))
    assert collate(rows[:3])["attention_mask"].shape == (3, 7)
    values = load_task("signals", str(tmp_path), streaming=True, target_column=["mean", "both"], mean=0.5, std=2.0)
    assert values.processor.mean == 0.5
    assert next(iter(values.parts["test"]))["labels"].shape == (3,)

    with pytest.raises(
        InputError, match=r"training.max_steps: expected a whole number of steps >= 1 for a stream, found -1"
    ):
        task.training({})
    (tmp_path / "validation.jsonl").write_text('{"signal": [1.0], "label": 7}\n')
    with pytest.raises(InputError, match=r"validation row 0: expected a label within 0..1, found 7"):
        list(load_task("signals", str(tmp_path), streaming=True).parts["validation"])
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(InputError, match="a stream cannot be split; .* found no validation part"):
        load_task("signals", str(tmp_path), streaming=True)


def test_training_on_a_stream_of_values(tmp_path):
    for seed, (part, count) in enumerate((("train", 200), ("validation", 40), ("test", 40))):
        write_jsonl(tmp_path / f"{part}.jsonl", count, seed)
    experiment = Experiment.from_dict(
        {
            "name": "means",
            "task": {"name": "signals", "streaming": True, "target_column": "mean"},
            "model": {"order": 4, "theta": 12, "hidden_size": 16, "hidden_cell": "dense", "pooling": "mean"},
            "training": {"max_steps": 100, "learning_rate": 0.02, "per_device_train_batch_size": 16},
        }
    )
    result = train(experiment, tmp_path / "model", str(tmp_path), progress=False)
    assert len(result["history"]) == 10
    assert result["scores"]["test"]["nrmse"] < 0.5
    assert result["dataset"]["streamed"]["scaled by"] == "the first 200 training rows"
