"""The shipped experiments: each builds the model that its file describes, of the size that it says, and learns a step."""

import re
from pathlib import Path

import pytest
import torch
from made_data import write_images

from lmu_hf.baselines import class_of
from lmu_hf.experiment import Experiment
from lmu_hf.kinds import KINDS
from lmu_hf.tasks import load_task
from lmu_hf.tasks.base import collate
from lmu_hf.training import build_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
# The same experiment on less data; what is measured here does not depend on it.
SMALL = {"mackey_glass": {"steps": 60, "window": 30, "series": 16}, "delay": {"delay": 40, "rows": 4}}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_size_and_a_step(path, tmp_path):
    experiment = Experiment.read(path)
    name = experiment.task["name"]
    data = None
    if name == "psmnist":
        for part in ("train", "test"):
            write_images(tmp_path / f"{part}.parquet", [index % 10 for index in range(12)])
        data = str(tmp_path)
    options = {key: value for key, value in experiment.task.items() if key != "name"}
    task = load_task(name, data, **{**options, **SMALL.get(name, {})})
    config = build_config(experiment, task)
    model = class_of(config, KINDS[task.kind].head)(config)
    (said,) = re.findall(r"([\d,]+) parameters", path.read_text())[:1]
    assert f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}" == said

    batch = collate([task.parts["train"][index] for index in range(2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model.eval()  # without dropout, so that the same loss is measured twice
    before = model(**batch).loss
    before.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    optimizer.step()
    assert model(**batch).loss < before
