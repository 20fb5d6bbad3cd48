"""The README's code runs, its table shows what the result files say, and nothing names the machine it was made on."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lmu_hf.cli import app
from lmu_hf.experiment import Experiment

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "model_cards").glob("*.json"))


def test_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer, tasks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(layer, names)
    assert names["window"].shape == (4, 2, 100)
    assert (tmp_path / "my-lmu" / "model.safetensors").exists()
    exec(tasks, names)
    assert names["text"].shape == (3, 32)
    assert names["future"].shape == (3, 50, 1)
    assert names["logits"].shape == (3, 5)


def test_yaml_example_is_valid(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "waves.yaml").write_text(text)
    assert Experiment.read(tmp_path / "waves.yaml").name == "waves"


def test_named_files_exist():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"(?:scripts|configs)/[\w./-]+\w", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results(path):
    result = json.loads(path.read_text())
    assert result["reloaded"]["same"]
    scores = result["scores"]["test"]
    metric = "accuracy" if "accuracy" in scores else "nrmse"
    # The shares that accuracy is made of are whole rows; errors are sums, which threads add up in another order.
    assert result["reloaded"][metric] == pytest.approx(scores[metric], rel=0 if metric == "accuracy" else 1e-5)
    config = Experiment.read(ROOT / "configs" / f"{result['name']}.yaml", [f"seed={result['experiment']['seed']}"])
    assert config.to_dict() == result["experiment"], "the committed config is not the one that gave this result"
    assert f"[{100 * scores[metric]:.2f}](model_cards/{path.name})" in README


def test_table_of_results_is_that_of_the_records():
    command = [sys.executable, str(ROOT / "scripts" / "results_table.py"), "--check"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_every_row_can_be_reproduced():
    rows = yaml.safe_load((ROOT / "model_cards" / "published.yaml").read_text())
    called = " ".join(path.read_text() for path in (ROOT / "scripts").glob("reproduce_*.sh")).split()
    for name in rows:
        assert (ROOT / "configs" / f"{name}.yaml").exists(), name
        assert name in called, name


def test_commands_of_the_readme_are_understood():
    """Every `lmu-hf train` and `search` in it has options that exist."""
    commands = re.findall(r"lmu-hf (train|search)\b([^\n`]*)", README)
    assert len(commands) > 5
    for command, rest in commands:
        known = help_of(command)
        for option in re.findall(r"(--[a-z][a-z-]+)", rest.partition("#")[0]):
            assert option in known, (command, option)


@functools.cache
def help_of(command):
    return CliRunner().invoke(app, [command, "--help"], terminal_width=200).output


def test_nothing_names_a_machine():
    found = subprocess.run(
        ["git", "grep", "-nIE", r"(^|[^A-Za-z0-9_.])/(work|root|farm|home/[a-z]+)/", "--", ".", ":!tests/test_docs.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not found.stdout, found.stdout


def test_map_of_contributing_is_the_tree():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in (ROOT / "lmu_hf").rglob("*.py"):
        if path.name != "__init__.py" and path.parent.name != "tasks":
            assert re.search(rf"^ +{path.name} ", text, re.MULTILINE), f"{path.name} is not on the map"
