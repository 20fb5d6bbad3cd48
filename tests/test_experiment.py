"""Experiments from YAML: every wrong key is named."""

from pathlib import Path

import pytest

from lmu_hf.errors import InputError
from lmu_hf.experiment import Experiment

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    experiment = Experiment.read(path)
    assert experiment.name == path.stem
    assert Experiment.from_dict(experiment.to_dict()) == experiment


def write(tmp_path, text):
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    return path


def test_overrides(tmp_path):
    path = write(tmp_path, "task: {name: digits}\nmodel: {order: 8}\n")
    changed = Experiment.read(
        path, ["model.order=16", "training.learning_rate=1e-3", "seed=7", "model.theta=[[3.0], [4.0]]"]
    )
    assert changed.name == "digits"
    assert changed.model == {"order": 16, "theta": [[3.0], [4.0]]}
    assert changed.training["learning_rate"] == 0.001
    assert changed.seed == 7


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("task: {name: digits}\nmodle: {order: 8}", [], "config: unknown key 'modle'; did you mean 'model'"),
        ("task: {name: digits}\nmodel: {ordr: 8}", [], "model: unknown key 'ordr'; did you mean 'order'"),
        ("task: {name: digits}\ntraining: {learning_rat: 8}", [], "did you mean 'learning_rate'"),
        ("task: {name: digits}\ntraining: {output_dir: x}", [], "training.output_dir: set by the run"),
        ("task: {permute: true}", [], "task.name: expected the name of a task"),
        ("- 1", [], "expected a mapping .*found list"),
        ("a: [", [], "is no YAML"),
        ("task: 3", [], "task: expected a mapping"),
        ("task: {name: digits}\nseed: one", [], "seed: expected a whole number"),
        ("task: {name: digits}", ["model.order"], "expected key=value"),
        ("task: {name: digits}\nseed: 1", ["seed.a=2"], "'seed' in 'seed.a=2' is no section"),
    ],
)
def test_errors(tmp_path, text, overrides, message):
    with pytest.raises(InputError, match=message):
        Experiment.read(write(tmp_path, text), overrides)


def test_missing_file():
    with pytest.raises(InputError, match="config: no file"):
        Experiment.read("nowhere.yaml")
