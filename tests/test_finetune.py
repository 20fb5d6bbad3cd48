"""Training from a checkpoint: what is taken over, what is made anew, what is refused, and that the card says so."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lmu_hf import LMUForSequenceClassification
from lmu_hf.card import write_card
from lmu_hf.errors import InputError
from lmu_hf.experiment import Experiment
from lmu_hf.finetune import Base
from lmu_hf.tasks import load_task
from lmu_hf.training import build_model, train


def write(folder, names, count=60):
    rng = np.random.default_rng(len(names))
    rows = [
        {"signal": (10 + rng.normal(size=8 + index % 5)).tolist(), "label": names[index % len(names)]}
        for index in range(count)
    ]
    path = folder / f"{len(names)}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def experiment(**model):
    return Experiment.from_dict(
        {
            "name": "tuned",
            "task": {"name": "signals"},
            "model": model,
            "training": {"num_train_epochs": 1, "learning_rate": 0.001, "per_device_train_batch_size": 16},
        }
    )


SMALL = {"order": 6, "theta": 12, "hidden_size": 8, "hidden_cell": "dense"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    train(experiment(**SMALL), folder / "waves-base", write(folder, ["a", "b"]), progress=False)
    return folder / "waves-base"


def test_new_labels_make_a_new_head(base, tmp_path):
    data = write(tmp_path, ["x", "y", "z"])
    result = train(experiment(classifier_dropout=0.1), tmp_path / "tuned", data, base_model=str(base), progress=False)
    assert result["fine_tuned_from"] == {"name": "waves-base", "on_hub": False, "head": "new"}
    assert result["base_model"] is None
    assert result["reloaded"]["same"]
    model = LMUForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert (model.config.order, model.config.theta, model.config.classifier_dropout) == (6, 12, 0.1)
    assert model.config.label_names == ["x", "y", "z"]
    # Signals are scaled as the base learned them, not anew.
    processors = [json.loads((folder / "preprocessor_config.json").read_text()) for folder in (base, tmp_path / "tuned")]
    assert processors[0] == processors[1]
    for path in (tmp_path / "tuned").glob("*.json"):
        assert str(base.parent) not in path.read_text(), path

    files = {path.name: path for path in (tmp_path / "tuned").iterdir()}
    card = write_card(files, "ada/tuned", result=result)
    assert "It is fine-tuned from the checkpoint waves-base, with a new head, which is not published with it." in card
    assert "--model waves-base" in card
    result |= {"base_model": "bob/waves", "fine_tuned_from": {"name": "bob/waves", "on_hub": True, "head": "new"}}
    card = write_card(files, "ada/tuned", result=result)
    assert "It is a fine-tuned [bob/waves](https://huggingface.co/bob/waves), with a new head." in card
    assert "base_model: bob/waves" in card


def test_it_begins_with_the_weights_of_the_base(base, tmp_path):
    weights = load_file(base / "model.safetensors")
    same = Base(str(base))
    model = build_model(experiment(), load_task("signals", write(tmp_path, ["a", "b"]), same.processor), same)
    assert same.record["fine_tuned_from"]["head"] == "taken over"
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    other = Base(str(base))
    model = build_model(experiment(), load_task("signals", write(tmp_path, ["b", "c"]), other.processor), other)
    assert other.record["fine_tuned_from"]["head"] == "new"
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]) == (not name.startswith("score.weight")) or name == "score.bias", name


def test_what_does_not_fit_is_refused(base, tmp_path):
    data = write(tmp_path, ["a", "b"])
    checkpoint = Base(str(base))
    task = load_task("signals", data, checkpoint.processor)
    build_model(experiment(**SMALL), task, checkpoint)  # the same architecture may be spelled out
    with pytest.raises(InputError, match=r"model.order: the model .* has 6, found 7; fine-tuning keeps the architecture"):
        build_model(experiment(order=7), task, checkpoint)
    with pytest.raises(InputError, match=r"model: this task needs a LMUImageProcessor, the model comes with a LMUFeature"):
        load_task("digits", None, checkpoint.processor)
    for source, message in (
        (str(tmp_path), "holds no config.json"),
        ("nowhere/at-all", "could not be loaded"),
        (" ", "empty text"),
    ):
        with pytest.raises(InputError, match=message):
            Base(source)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match="expected an LMU, found a model of the type 'bert'"):
        Base(str(tmp_path))
