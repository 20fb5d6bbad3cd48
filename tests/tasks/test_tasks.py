"""Tasks on small data made here: the parts, the orders, and what is wrong with a file."""

import json

import numpy as np
import pytest
import torch
from made_data import write_images

from lmu_hf.errors import InputError
from lmu_hf.tasks import load_task
from lmu_hf.tasks.base import Part, collate
from lmu_hf.tasks.psmnist import pixel_order


@pytest.fixture
def mnist(tmp_path):
    write_images(tmp_path / "train-0.parquet", [i % 10 for i in range(60)])
    write_images(tmp_path / "test-0.parquet", [i % 10 for i in range(20)], seed=1)
    return tmp_path


def write_signals(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def signals(count, channels=1, start=0):
    rng = np.random.default_rng(start)
    rows = []
    for index in range(count):
        signal = rng.normal(size=(5 + index % 7, channels)) + index % 2
        rows.append({"signal": signal[:, 0].tolist() if channels == 1 else signal.tolist(), "label": index % 2})
    return rows


def test_published_pixel_orders():
    assert pixel_order("keras-lmu")[:3] == [693, 85, 647]
    assert sorted(pixel_order("voelker2019")) == list(range(784))
    assert pixel_order("voelker2019") != pixel_order("keras-lmu")
    assert pixel_order("none") is None


def test_digits():
    task = load_task("digits")
    assert {name: len(part) for name, part in task.parts.items()} == {"train": 1257, "validation": 180, "test": 360}
    assert task.input_size == 1
    # The parts do not share an image; 1,797 images hold no exact duplicates.
    rows = [tuple(value.flatten().tolist()) for part in task.parts.values() for value in part.values]
    assert len(set(rows)) == len(rows) == 1797
    unpermuted = load_task("digits", permute=False)
    first, plain = task.parts["test"].values[0], unpermuted.parts["test"].values[0]
    assert torch.equal(plain[task.processor.permutation], first)
    with pytest.raises(InputError, match="leave out --data"):
        load_task("digits", "somewhere")


def test_psmnist(mnist):
    task = load_task("psmnist", str(mnist))
    assert task.dataset["rows"] == {"train": 50, "validation": 10, "test": 20}
    assert task.parts["validation"].labels.tolist() == list(range(10))
    assert task.processor.permutation == pixel_order("keras-lmu")
    assert task.parts["train"].values[0].shape == (784, 1)
    assert "path" not in json.dumps(task.dataset)
    assert str(mnist) not in json.dumps(task.dataset)


def test_psmnist_rejects(mnist, tmp_path):
    with pytest.raises(
        InputError, match="no column 'picture' for the image, found .'image', 'label'.; name it with task.image"
    ):
        load_task("psmnist", str(mnist), image_column="picture")
    with pytest.raises(InputError, match=r"task.permutation: expected one of"):
        load_task("psmnist", str(mnist), permutation="random")
    with pytest.raises(InputError, match="takes the options .* found .'shuffle'"):
        load_task("psmnist", str(mnist), shuffle=True)
    write_images(mnist / "test-0.parquet", [1, 2, 11])
    with pytest.raises(InputError, match=r"test row 2: expected a label within 0..9, found 11"):
        load_task("psmnist", str(mnist))
    write_images(mnist / "test-0.parquet", [1], shape=(14, 14))
    with pytest.raises(InputError, match="test row 0: images: expected 28 x 28 pixels, found 14 x 14"):
        load_task("psmnist", str(mnist))
    (mnist / "test-0.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(InputError, match="could not be read as parquet"):
        load_task("psmnist", str(mnist))
    (mnist / "test-0.parquet").unlink()
    with pytest.raises(InputError, match="found no test part"):
        load_task("psmnist", str(mnist))
    with pytest.raises(InputError, match="no file or folder"):
        load_task("psmnist", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("channels", [1, 3])
def test_signals_in_one_file_are_split(tmp_path, channels):
    write_signals(tmp_path / "all.jsonl", signals(100, channels))
    task = load_task("signals", str(tmp_path / "all.jsonl"))
    assert task.dataset["rows"] == {"train": 81, "validation": 10, "test": 9}
    assert task.input_size == channels
    everything = torch.cat(task.parts["train"].values)
    assert torch.allclose(everything.mean(0), torch.zeros(channels), atol=1e-5)
    assert torch.allclose(everything.std(0, correction=0), torch.ones(channels), atol=1e-5)


def test_signals_in_parts_with_names(tmp_path):
    for part, count in (("train", 20), ("validation", 6), ("test", 6)):
        rows = [{"x": row["signal"], "kind": "ab"[row["label"]]} for row in signals(count)]
        write_signals(tmp_path / f"{part}.jsonl", rows)
    task = load_task("signals", str(tmp_path), signal_column="x", label_column="kind")
    assert task.label_names == ["a", "b"]
    assert task.dataset["split"] == "as given"
    batch = collate([task.parts["train"][i] for i in range(4)])
    assert batch["input_values"].shape == (4, 8, 1)
    assert batch["attention_mask"].sum(1).tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[3].update(signal=[1.0, None, 2.0]), "train row 3: .*finite.* at step 1"),
        (lambda rows: rows[3].update(signal=[]), "train row 3: expected a signal"),
        (lambda rows: rows[3].update(label=7), "labels 0 .. n-1 without gaps, found"),
        (lambda rows: rows[3].update(label=-1), "without gaps"),
        (lambda rows: [row.pop("label") for row in rows], "no column 'label' for the label"),
        (lambda rows: rows.clear() or rows.extend(signals(3)), "too few rows"),
    ],
)
def test_signals_reject(tmp_path, change, message):
    rows = signals(40)
    change(rows)
    write_signals(tmp_path / "train.jsonl", rows)
    with pytest.raises(InputError, match=message):
        load_task("signals", str(tmp_path / "train.jsonl"))


def test_labels_that_training_never_saw(tmp_path):
    write_signals(tmp_path / "train.jsonl", [{**row, "label": "ab"[row["label"]]} for row in signals(40)])
    write_signals(tmp_path / "test.jsonl", [{"signal": [1.0], "label": "c"}])
    with pytest.raises(InputError, match="test row 0: label 'c' does not occur in the training part"):
        load_task("signals", str(tmp_path))


def test_unknown_task_and_missing_data():
    with pytest.raises(InputError, match="task: expected one of"):
        load_task("imagenet")
    with pytest.raises(InputError, match="expected --data"):
        load_task("signals")
    with pytest.raises(InputError, match="could not be loaded from the Hub"):
        load_task("signals", "nobody/nothing")


def test_equal_lengths_need_no_mask():
    part = Part(np.zeros((3, 4, 1), dtype=np.float32), [0, 1, 0])
    assert set(collate([part[0], part[1]])) == {"input_values", "labels"}
