"""Texts from every kind of file, a tokenizer trained on the spot, and models that a pipeline of transformers takes."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer, pipeline

from lmu_hf.errors import InputError
from lmu_hf.experiment import Experiment
from lmu_hf.predict import predict
from lmu_hf.tasks import load_task
from lmu_hf.tasks.base import collate
from lmu_hf.tasks.text import train_tokenizer
from lmu_hf.training import train

GOOD, BAD = ["good", "great", "fine", "lovely"], ["bad", "awful", "poor", "dreadful"]
FILLERS = ["film", "book", "day", "meal", "the", "a", "very", "was"]


def rows(count, seed=0, bad=2):
    """Texts with one telling word somewhere; one in ``bad`` is bad."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        words = list(rng.choice(FILLERS, rng.integers(2, 9)))
        words.insert(int(rng.integers(len(words) + 1)), str(rng.choice(BAD if index % bad == 0 else GOOD)))
        made.append({"text": " ".join(words), "label": "bad" if index % bad == 0 else "good"})
    return made


def write(path, found):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    else:
        names = list(found[0])
        path.write_text("\n".join([",".join(names), *(",".join(str(row[name]) for name in names) for row in found)]) + "\n")


def test_train_and_use(tmp_path):
    write(tmp_path / "reviews.csv", [{"review": row["text"], "kind": row["label"]} for row in rows(240, bad=4)])
    experiment = Experiment.from_dict(
        {
            "name": "reviews",
            "task": {
                "name": "text",
                "text_column": "review",
                "label_column": "kind",
                "vocab_size": 300,
                "class_weights": "balanced",
            },
            "model": {"input_size": 16, "memory_d": 8, "order": 4, "theta": 40, "hidden_size": 32, "hidden_cell": "dense"},
            "training": {"num_train_epochs": 12, "learning_rate": 0.01, "per_device_train_batch_size": 16},
        }
    )
    result = train(experiment, tmp_path / "model", str(tmp_path / "reviews.csv"), progress=False)
    assert result["scores"]["test"]["accuracy"] == 1.0
    assert result["class_weights"] == {"bad": pytest.approx(2.0, rel=0.1), "good": pytest.approx(0.667, rel=0.1)}
    assert str(tmp_path) not in json.dumps(result)
    classify = pipeline("text-classification", str(tmp_path / "model"))
    assert [answer["label"] for answer in classify(["the film was lovely", "a dreadful day", ""][:2])] == ["good", "bad"]
    # Rows of different lengths in one batch, padded by the tokenizer: each gets what it gets alone.
    texts = [row["text"] for row in rows(6)]
    together = [answer["score"] for answer in classify(texts, batch_size=6)]
    alone = [classify(text)[0]["score"] for text in texts]
    assert together == pytest.approx(alone, abs=1e-5)
    (tmp_path / "one.txt").write_text("a great book")
    (tmp_path / "none.txt").write_text("")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    (answer,) = predict(classify.model, tokenizer, [str(tmp_path / "one.txt")])
    assert next(iter(answer["probabilities"])) == "good"
    with pytest.raises(InputError, match=r"none.txt: expected a text of at least one token"):
        predict(classify.model, tokenizer, [str(tmp_path / "none.txt")])


def test_tokenizers():
    texts = ["Hello, world", "hello again", "grüße 🌍"] * 3
    tokenizer = train_tokenizer(texts, 300)
    assert len(tokenizer) <= 300
    for text in (*texts, "never seen ☃"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    batch = tokenizer(texts[:2], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert tokenizer.pad_token_id == 0
    lower = train_tokenizer(texts, 300, lowercase=True)
    assert lower("HELLO")["input_ids"] == lower("hello")["input_ids"]


def test_folders_of_texts_and_a_given_tokenizer(tmp_path):
    train_tokenizer([row["text"] for row in rows(50)], 280).save_pretrained(tmp_path / "tokenizer")
    for part, count in (("train", 20), ("test", 4)):
        for index, row in enumerate(rows(count)):
            file = tmp_path / "data" / part / row["label"] / f"{index}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(row["text"])
    task = load_task("text", str(tmp_path / "data"), tokenizer=str(tmp_path / "tokenizer"), max_length=3)
    assert task.label_names == ["bad", "good"]
    assert task.dataset["rows"] == {"train": 18, "validation": 2, "test": 4}
    assert task.fields["vocab_size"] == len(AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    assert max(len(value) for part in task.parts.values() for value in part.values) == 3
    assert task.dataset["cut"]["rows"] > 0
    batch = collate([task.parts["train"][index] for index in range(3)])
    assert set(batch) <= {"input_ids", "attention_mask", "labels"}
    flat = load_task("text", str(tmp_path / "data" / "train"))
    assert flat.label_names == ["bad", "good"]


@pytest.mark.parametrize(
    ("found", "options", "message"),
    [
        ([{"text": "", "label": "good"}, *rows(30)], {}, "expected a text of at least one token, found ''"),
        (rows(30), {"text_column": "body"}, "no column 'body' for the text, found .* name it with task.text_column"),
        ([{**row, "text": 3} for row in rows(30)], {}, "train row 0: expected a text, found '3'"),
        (rows(30), {"vocab_size": 10}, "task.vocab_size: expected a whole number >= 258, found 10"),
        (rows(30), {"max_length": 0}, "task.max_length: expected a whole number >= 1"),
        (rows(30), {"tokenizer": "nowhere/at-all"}, "task.tokenizer: nowhere/at-all could not be loaded"),
        (rows(30), {"class_weights": [1]}, "task.class_weights: expected 'balanced' or 2 numbers > 0, found .1."),
        (rows(30), {"class_weights": [1, -1]}, "2 numbers > 0"),
        (rows(3), {}, "too few rows"),
    ],
)
def test_rejects(tmp_path, found, options, message):
    write(tmp_path / "train.jsonl", found)
    with pytest.raises(InputError, match=message):
        load_task("text", str(tmp_path / "train.jsonl"), **options)
