"""The README's code runs, its table shows what the result files say, and nothing names the machine it was made on."""

import json
import re
import subprocess
from pathlib import Path

import pytest

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
    assert result["reloaded"]["accuracy"] == result["scores"]["test"]["accuracy"]
    config = Experiment.read(ROOT / "configs" / f"{result['name']}.yaml", [f"seed={result['experiment']['seed']}"])
    assert config.to_dict() == result["experiment"], "the committed config is not the one that gave this result"
    assert f"{100 * result['scores']['test']['accuracy']:.2f}" in README


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
