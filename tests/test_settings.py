"""What a run can be told about machine and trackers, on a machine that has only a CPU."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lmu_hf import reports, running
from lmu_hf.errors import InputError
from lmu_hf.experiment import Experiment
from lmu_hf.tasks import load_task
from lmu_hf.training import _fit, build_model, build_trainer, train

CONFIG = {
    "name": "quick",
    "task": {"name": "digits"},
    "model": {"order": 8, "theta": 64, "hidden_size": 20, "hidden_cell": "dense"},
    "training": {"num_train_epochs": 1, "learning_rate": 0.01, "per_device_train_batch_size": 256},
}


def experiment(**training):
    return Experiment.from_dict({**CONFIG, "training": {**CONFIG["training"], **training}})


@pytest.fixture(scope="module")
def digits():
    return load_task("digits")


def trainer(task, tmp_path, **training):
    found = experiment(**training)
    return build_trainer(build_model(found, task), found, task, running.Run(tmp_path), False)


@pytest.mark.parametrize(
    "flags",
    [
        {"bf16": True},
        {"dataloader_pin_memory": False, "dataloader_num_workers": 1},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"activation_checkpointing": True},
    ],
    ids=lambda flags: next(iter(flags)),
)
def test_flags_that_a_cpu_can_follow(digits, tmp_path, flags):
    flagged = trainer(digits, tmp_path, use_cpu=True, max_steps=2, eval_strategy="no", save_strategy="no", **flags)
    flagged.args.load_best_model_at_end = False
    flagged.train()
    assert flagged.state.global_step == 2
    assert all(value.dtype == torch.float32 for value in flagged.model.state_dict().values()), "weights stay as they are"
    assert all(torch.isfinite(value).all() for value in flagged.model.state_dict().values())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="what a CPU cannot do")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tf32": True}, "training: --tf32 requires Ampere or a newer GPU"),
        ({"bf16_full_eval": True}, "training: .* You need to assign use_cpu"),
        ({"optim": "adamw_bnb_8bit"}, "training: You need to install .bitsandbytes."),
    ],
)
def test_flags_that_it_cannot(digits, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        _fit(trainer(digits, tmp_path, **flags), None)


def test_rows_are_never_dropped():
    with pytest.raises(InputError, match="dataloader_drop_last: would leave rows of the validation part out"):
        experiment(dataloader_drop_last=True)


def test_tensorboard(tmp_path):
    result = train(experiment(report_to=["tensorboard"]), tmp_path / "run", progress=False)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (loss,) = [event.value for event in events.Scalars("eval/loss")]
    assert loss == pytest.approx(result["history"][0]["loss"])
    assert result["experiment"]["training"]["report_to"] == ["tensorboard"]
    json.dumps(result)


def test_trackers_that_are_not_there(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(reports.importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "trackio", "wandb"):
        with pytest.raises(InputError, match=rf"training.report_to: {name} is not installed; pip install {name}"):
            trainer(digits, tmp_path, report_to=name)
    with pytest.raises(InputError, match="training.report_to: expected some of .*, found 'papyrus'"):
        trainer(digits, tmp_path, report_to=["papyrus"])
