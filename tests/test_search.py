"""A search on the digits: what it tries, that it never looks at the test part, and that its result can be trained."""

import json

import pytest

from lmu_hf import search as module
from lmu_hf.errors import InputError
from lmu_hf.experiment import Experiment
from lmu_hf.search import default_space, search
from lmu_hf.tasks import load_task

CONFIG = {
    "name": "digits-search",
    "task": {"name": "digits"},
    "model": {"order": 8, "theta": 64, "hidden_size": 20, "hidden_cell": "dense"},
    "training": {"num_train_epochs": 2, "learning_rate": 0.01, "per_device_train_batch_size": 128},
}


class Forbidden:
    """A test part that nothing may look at."""

    def __len__(self):
        raise AssertionError("the test part was looked at")

    __getitem__ = __iter__ = __len__


def test_search(tmp_path, monkeypatch, capsys):
    def without_test_part(experiment, data):
        task = load_task("digits")
        task.parts["test"] = Forbidden()
        return task

    monkeypatch.setattr(module, "task_of", without_test_part)
    experiment = Experiment.from_dict(CONFIG)
    results = [search(experiment, tmp_path / name, trials=3) for name in ("a", "b")]
    for result, folder in zip(results, ("a", "b"), strict=True):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["best.yaml", "trials.json"]
        assert json.loads((tmp_path / folder / "trials.json").read_text()) == result
        assert (result["part"], result["metric"], result["direction"]) == ("validation", "accuracy", "maximize")
        assert len(result["trials"]) == 3
        assert result["best"]["value"] == max(trial["value"] for trial in result["trials"])
    assert [trial["settings"] for trial in results[0]["trials"]] == [trial["settings"] for trial in results[1]["trials"]]
    assert [trial["value"] for trial in results[0]["trials"]] == [trial["value"] for trial in results[1]["trials"]]
    found = Experiment.read(tmp_path / "a" / "best.yaml")
    for name, value in results[0]["best"]["settings"].items():
        section, key = name.split(".")
        assert getattr(found, section)[key] == value
    assert "save_strategy" not in found.training
    assert found.seed == experiment.seed
    assert capsys.readouterr().out.count("trial 3 of 3: accuracy") == 2
    with pytest.raises(InputError, match="is not empty and is left as it is"):
        search(experiment, tmp_path / "a", trials=1)


def test_space():
    task = load_task("digits")

    def names(**model):
        return set(default_space(Experiment.from_dict({**CONFIG, "model": model}), task))

    always = {"training.learning_rate", "training.weight_decay", "model.classifier_dropout"}
    assert names() == always | {"model.order", "model.hidden_size", "model.theta"}
    assert names(theta=[10.0, 20.0], memory_d=2) == always | {"model.order", "model.hidden_size"}
    assert names(hidden_cell="readout") == always | {"model.order", "model.theta"}


def test_what_is_wrong(tmp_path, monkeypatch):
    experiment = Experiment.from_dict(CONFIG)
    with pytest.raises(InputError, match="trials: expected a whole number >= 1, found 0"):
        search(experiment, tmp_path / "x", trials=0)
    baseline = Experiment.from_dict({**CONFIG, "model": {"model_type": "recurrent"}})
    with pytest.raises(InputError, match="the search is for LMUs"):
        search(baseline, tmp_path / "x")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs optuna; install lmu-hf.search."):
        search(experiment, tmp_path / "x")
    assert not any(tmp_path.iterdir())
