"""What people do with a converted folder: score it, fine-tune it, use it in a pipeline, publish it, load it elsewhere."""

import hashlib
import json
import os
import sys

import numpy as np
import processes
import pytest
import torch
from keras_files import Made
from made_data import read_images, write_images
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSequenceClassification, pipeline
from typer.testing import CliRunner

from lmu_hf import LMUFeatureExtractor, LMUForSequenceClassification, LMUImageProcessor
from lmu_hf.cli import app
from lmu_hf.experiment import Experiment
from lmu_hf.finetune import Base
from lmu_hf.tasks import load_task
from lmu_hf.tasks.psmnist import pixel_order
from lmu_hf.training import build_model

loads_images = pytest.mark.skipif(
    getattr(AutoImageProcessor, "is_dummy", False),
    reason="early versions of transformers 5 load no images without torchvision",
)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def published(tmp_path):
    """A file of 2019 with weights alone, and images labelled with what it answers to their permuted pixels."""
    made = Made("2019", units=6, order=8, theta=784.0, inputs=1, classes=10)
    data = tmp_path / "mnist"
    data.mkdir()
    pixels = {}
    for part, count in (("train", 12), ("test", 60)):
        path = write_images(data / f"{part}-0.parquet", [0] * count, seed=count)
        pixels[part] = read_images(path).reshape(count, 784, 1) / 255
    hidden = {part: made.steps(x[:, pixel_order("voelker2019")])[:, -1] for part, x in pixels.items()}
    # Noise looks all alike to a model with random weights: let its classes tell small differences from the mean.
    made.head["kernel"] *= 50
    made.head["bias"] = (-hidden["test"].mean(0) @ made.head["kernel"]).astype(np.float32)
    for part, z in hidden.items():
        answers = made.classify(z).argmax(-1)
        write_images(data / f"{part}-0.parquet", answers.tolist(), seed=len(z))
    made.h5(tmp_path / "published.hdf5", config=None)
    return tmp_path, data, np.bincount(answers).max() / len(answers)


def scores(*arguments):
    finished = run("evaluate", *arguments, "--json")
    assert finished.exit_code == 0, finished.output
    return json.loads(finished.stdout)


def test_a_published_score_is_reproduced_by_one_command(published):
    folder, data, usual = published
    assert run("convert", folder / "published.hdf5", folder / "model").exit_code == 0
    task = (folder / "model", "task.name=psmnist", "--data", data)
    found = scores(*task, "task.permutation=voelker2019")
    assert (found["accuracy"], found["rows"], found["labels"]) == (1.0, 60, [str(digit) for digit in range(10)])
    assert usual < 0.6  # so that a constant answer would not do
    # In another order of the pixels it does not see what it was trained on.
    assert scores(*task, "task.permutation=keras-lmu")["accuracy"] < 0.9
    (folder / "task.yaml").write_text("task: {name: psmnist, permutation: voelker2019}")
    assert scores(folder / "model", folder / "task.yaml", "--data", data)["accuracy"] == 1.0

    # With the processor beside it, it is a model like others: the order of its pixels is its own.
    LMUImageProcessor(permutation=pixel_order("voelker2019")).save_pretrained(folder / "model")
    assert scores(*task)["accuracy"] == 1.0
    finished = run("evaluate", *task, "task.permutation=keras-lmu")
    assert finished.exit_code == 2
    assert "the model reads its pixels in another order than 'keras-lmu'" in finished.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "has no result.json, which would name the task; name it, for example task.name=psmnist"),
        (["task.permutation=voelker2019"], "task.name: expected the name of a task, found none"),
        (["task.name=mnist"], "task: expected one of"),
        (["task.name=digits"], "data: expected 3 features per step, as the model was trained on, found 1"),
        (["nowhere.yaml"], "config: no file nowhere.yaml"),
    ],
)
def test_what_cannot_be_scored(tmp_path, arguments, message):
    Made("2019").h5(tmp_path / "model.h5")
    run("convert", tmp_path / "model.h5", tmp_path / "model")
    finished = run("evaluate", tmp_path / "model", *arguments)
    assert finished.exit_code == 2, finished.output
    assert finished.output.count("\n") == 1
    assert message in finished.output


def test_fine_tuning_begins_with_all_of_its_weights(tmp_path):
    """The head too: a file of Keras names no labels, so they are known by their number."""
    made = Made("0.9", cells=["GRU"], hidden_to_memory=True)
    made.keras(tmp_path / "model.keras")
    assert run("convert", tmp_path / "model.keras", tmp_path / "model").exit_code == 0
    rng = np.random.default_rng(0)
    rows = [{"signal": rng.normal(size=(9 + i % 3, 3)).tolist(), "label": "abc"[i % 3]} for i in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tune.yaml").write_text(
        "name: tuned\ntask: {name: signals}\n"
        "training: {num_train_epochs: 1, learning_rate: 0.0, per_device_train_batch_size: 16}\n"
    )
    arguments = ("train", tmp_path / "tune.yaml", "--model", tmp_path / "model", "--data", tmp_path / "data.jsonl")
    finished = run(*arguments, "--output", tmp_path / "tuned", "--no-progress")
    assert finished.exit_code == 0, finished.output
    result = json.loads((tmp_path / "tuned" / "result.json").read_text())
    assert result["fine_tuned_from"] == {"name": "model", "on_hub": False, "head": "taken over"}
    assert result["reloaded"]["same"]
    # At a learning rate of zero it is still the original, with names for its labels.
    tuned = LMUForSequenceClassification.from_pretrained(tmp_path / "tuned").eval()
    assert tuned.config.label_names == ["a", "b", "c"]
    with torch.inference_mode():
        found = tuned(input_values=torch.from_numpy(made.x())).logits.softmax(-1)
    np.testing.assert_allclose(found.numpy(), made(made.x()), rtol=0, atol=1e-6)  # float32


def test_fine_tuning_of_weights_whose_loss_nobody_knows(published):
    folder, data, _ = published
    run("convert", folder / "published.hdf5", folder / "model")
    base = Base(str(folder / "model"))
    assert base.config.problem_type is None
    experiment = Experiment.from_dict({"task": {"name": "psmnist"}})
    model = build_model(experiment, load_task("psmnist", str(data)), base)
    assert model.config.problem_type == "single_label_classification"
    weights = LMUForSequenceClassification.from_pretrained(folder / "model").state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@loads_images
def test_pipelines_and_predict(published):
    folder, data, _ = published
    run("convert", folder / "published.hdf5", folder / "model")
    processor = LMUImageProcessor(permutation=pixel_order("voelker2019"))
    processor.save_pretrained(folder / "model")
    classify = pipeline("image-classification", str(folder / "model"))
    images = read_images(data / "test-0.parquet")[:8]
    with torch.inference_mode():
        model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
        expected = model(**processor(list(images), return_tensors="pt")).logits.argmax(-1).tolist()
    answers = [max(classify(Image.fromarray(image)), key=lambda found: found["score"])["label"] for image in images]
    assert answers == [f"LABEL_{label}" for label in expected]
    Image.fromarray(images[0]).save(folder / "digit.png")
    finished = run("predict", folder / "model", folder / "digit.png", "--json")
    assert finished.exit_code == 0, finished.output
    assert max(json.loads(finished.stdout)[0]["probabilities"].items(), key=lambda pair: pair[1])[0] == answers[0]


ELSEWHERE = """
import json, sys
sys.modules["lmu_hf"] = None
import torch, transformers
model = transformers.AutoModelForSequenceClassification.from_pretrained("ada/converted", trust_remote_code=True).eval()
with torch.inference_mode():
    print(json.dumps(model(input_values=torch.tensor(x)).logits.softmax(-1).tolist()))
"""


@pytest.mark.parametrize("generation", ["2019", "first", "0.9"])
def test_published_and_loaded_where_lmu_hf_is_not_installed(hub, tmp_path, generation):
    options = {"cells": ["LSTM"], "hidden_to_memory": True} if generation != "2019" else {}
    made = Made(generation, **options)
    made.h5(tmp_path / "model.h5")
    assert run("convert", tmp_path / "model.h5", tmp_path / "model").exit_code == 0
    if generation == "0.9":  # with and without a processor
        LMUFeatureExtractor(feature_size=3).save_pretrained(tmp_path / "model")
    finished = run("push", tmp_path / "model", "converted")
    assert finished.exit_code == 0, finished.output
    card = hub.files("ada/converted")["README.md"].decode()
    assert "## Converted from Keras" in card
    assert hashlib.sha256((tmp_path / "model.h5").read_bytes()).hexdigest() in card
    code = f"x = {made.x().tolist()}\n{ELSEWHERE}"
    environment = {**os.environ, **hub.client(None, tmp_path / "fresh")}
    finished = processes.run([sys.executable, "-c", code], env=environment)
    assert finished.returncode == 0, finished.stderr
    np.testing.assert_allclose(json.loads(finished.stdout), made(made.x()), rtol=0, atol=1e-6)  # float32
