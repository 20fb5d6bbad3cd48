"""The command line, and the folder that it writes."""

import json

import h5py
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from keras_files import Made
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from lmu_hf.card import write_card
from lmu_hf.cli import app


@pytest.fixture
def files(tmp_path):
    made = Made("2019")
    made.h5(tmp_path / "old.hdf5")
    np.savez(tmp_path / "data.npz", x=made.x(), y=made(made.x()))
    np.savez(tmp_path / "other.npz", x=made.x(), y=made(made.x()) + 0.5)
    return tmp_path, made


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_convert(files):
    folder, made = files
    result = run(folder / "old.hdf5", folder / "new", "--verify", folder / "data.npz", "--tolerance", "1e-5")
    assert result.exit_code == 0, result.output
    assert "largest difference from the original's outputs:" in result.output
    assert "LMUForSequenceClassification, 80 parameters" in result.output
    written = {path.name for path in (folder / "new").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "modeling_heads.py"} <= written
    assert all(name.endswith(".py") for name in written - {"README.md", "config.json", "model.safetensors"})
    card = (folder / "new" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "`old.hdf5`, Keras 2.12.0" in card
    assert "applied a softmax" in card
    model = AutoModelForSequenceClassification.from_pretrained(folder / "new")
    with torch.inference_mode():
        logits = model(input_values=torch.from_numpy(made.x())).logits
    np.testing.assert_allclose(logits.softmax(-1).numpy(), made(made.x()), rtol=0, atol=1e-6)


def test_card_runs(files, monkeypatch):
    folder, _ = files
    run(folder / "old.hdf5", folder / "new")
    card = (folder / "new" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("PATH_OR_ID", str(folder / "new"))
    names: dict = {}
    exec(code, names)
    assert names["outputs"].logits.shape == (1, 3)


def test_weights_alone(files):
    folder, made = files
    made.h5(folder / "weights.h5", config=None)
    (folder / "model.json").write_text(json.dumps(made.config()))
    arguments = (folder / "weights.h5", folder / "new")
    Made("0.9").h5(folder / "later.h5", config=None)
    assert run(folder / "later.h5", folder / "new").exit_code == 2
    # The file of 2019 tells its architecture, but not that a softmax follows.
    result = run(*arguments, "--verify", folder / "data.npz")
    assert result.exit_code == 1
    assert "problem_type" in result.output
    softmax = json.dumps({"problem_type": "single_label_classification"})
    result = run(folder / "weights.h5", folder / "other", "--config", softmax, "--verify", folder / "data.npz")
    assert result.exit_code == 0, result.output
    result = run(*arguments, "--config", folder / "model.json", "--verify", folder / "data.npz")
    assert result.exit_code == 0, result.output


def test_a_difference_writes_nothing(files):
    folder, _ = files
    result = run(folder / "old.hdf5", folder / "new", "--verify", folder / "other.npz")
    assert result.exit_code == 1
    assert "differ by up to 5.00e-01" in result.output
    assert not (folder / "new").exists()


def test_to_keras(files):
    folder, _ = files
    assert run(folder / "old.hdf5", folder / "new").exit_code == 0
    result = run(folder / "new", folder / "back.keras", "--to", "keras")
    assert result.exit_code == 0, result.output
    assert "InputLayer -> RNN -> Dense, 80 parameters" in result.output
    result = run(folder / "back.keras", folder / "again", "--verify", folder / "data.npz")
    # Without a problem type softmax is left out; this one has it.
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["none.h5", "out"],
        ["data.npz", "out"],
        ["old.hdf5", "out", "--to", "onnx"],
        ["old.hdf5", "out", "--tolerance", "-1"],
        ["old.hdf5", "out", "--config", "none.json"],
        ["old.hdf5", "out", "--verify", "none.npz"],
        ["old.hdf5", "out.keras", "--to", "keras"],
        ["old.hdf5", "old.hdf5"],
    ],
)
def test_wrong_input_is_one_line(files, monkeypatch, arguments):
    folder, _ = files
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.output.startswith("lmu-hf: ")
    assert result.output.count("\n") == 1
    assert sorted(folder.iterdir()) == before


def test_card_after_a_push_keeps_where_the_weights_come_from(files):
    """And says neither Apache-2.0 of weights that are another's, nor everything twice."""
    folder, _ = files
    run(folder / "old.hdf5", folder / "new")
    own = (folder / "new" / "README.md").read_text()
    names = {path.name: path for path in (folder / "new").iterdir() if path.name != "README.md"}
    card = write_card(names, "me/psmnist", existing=own)
    data = ModelCard(card).data
    assert (data.license, data.license_name) == ("other", "that-of-the-original")
    assert card.count("\n# ") == 1
    assert "PATH_OR_ID" not in card
    assert "## Converted from Keras" in card
    assert "`old.hdf5`, Keras 2.12.0" in card


@pytest.mark.parametrize("kind", ["tokens", "steps", "linear steps", "bare"])
def test_card_of_every_class_runs(tmp_path, kind):
    made = Made("2019")
    config, layers = made.config(), made.named()
    first, lmu, dense = config["config"]["layers"]
    if kind == "tokens":
        first["config"]["batch_input_shape"] = [None, None]
        embedding = {"name": "embedding", "input_dim": 11, "output_dim": 3}
        config["config"]["layers"].insert(1, {"class_name": "Embedding", "config": embedding})
        layers = {"embedding": {"embedding/embeddings:0": np.ones((11, 3), np.float32)}} | layers
    elif kind == "bare":
        config["config"]["layers"].pop()
        del layers["dense_9"]
    else:
        lmu["config"]["return_sequences"] = True
        dense["config"]["activation"] = "softmax" if kind == "steps" else "linear"
    made.h5(tmp_path / "model.h5", config=config, layers=layers)
    result = run(tmp_path / "model.h5", tmp_path / "out")
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out" / "README.md").read_text()
    names: dict = {}
    exec(card.split("```python\n")[1].split("```")[0].replace("PATH_OR_ID", str(tmp_path / "out")), names)
    assert type(names["model"]).__name__ in result.output
    words = {
        "tokens": "3 logits",
        "steps": "3 logits per step",
        "linear steps": "3 predicted values per step",
        "bare": "4 features",
    }
    assert f"| output | {words[kind]}" in card


def test_card_holds_no_markup_of_a_file(tmp_path):
    made = Made("2019")
    config = made.config()
    config["config"]["layers"][1]["config"] |= {"name": "a\n\n# evil <script>", "trainable": False}
    made.h5(tmp_path / "model.h5", config=config)
    with h5py.File(tmp_path / "model.h5", "r+") as file:
        file.attrs["keras_version"] = "2.1\n\n<img src=x>" + 10_000 * "x"
    run(tmp_path / "model.h5", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "evil" in card
    assert not any(mark in card for mark in ("<script", "<img", "\n# evil"))
    assert len(card) < 4000
