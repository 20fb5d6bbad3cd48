"""Runs that are killed go on as if they had never been stopped; folders in use, and checkpoints that are not whole."""

import json
import random
import signal
import time

import killed
import pytest
import torch
from filelock import FileLock

from lmu_hf import running
from lmu_hf.errors import InputError
from lmu_hf.experiment import Experiment
from lmu_hf.training import train

# Dropout uses up random numbers all along; the best epoch is not the last; some epochs are cut by a checkpoint.
CONFIG = {
    "name": "digits-kill",
    "task": {"name": "digits"},
    "model": {"order": 8, "theta": 64, "hidden_size": 20, "hidden_cell": "dense", "classifier_dropout": 0.5},
    "training": {"num_train_epochs": 4, "learning_rate": 0.05, "per_device_train_batch_size": 64},
}
BY_STEPS = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 14,
    "save_steps": 14,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 32,
}


def write(folder, **training):
    content = {**CONFIG, "training": {**CONFIG["training"], **training}}
    (folder / "config.yaml").write_text(json.dumps(content))  # JSON is YAML
    return folder / "config.yaml"


def arguments(config, output):
    return ["train", config, "--output", output, "--no-progress"]


def unbroken(folder, **training):
    """A configuration and the folder of a run of it that was never stopped."""
    config = write(folder, **training)
    train(Experiment.read(config), folder / "whole", progress=False)
    return config, folder / "whole"


def assert_same(folder, whole):
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    found, expected = (json.loads((path / "result.json").read_text()) for path in (folder, whole))
    for key in ("history", "scores", "best_epoch", "confusion", "experiment", "reloaded"):
        assert found[key] == expected[key], key
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.timeout(900)  # ten processes, one after the other
def test_killed_at_the_worst_moments(tmp_path):
    config, whole = unbroken(tmp_path)
    folder = tmp_path / "run"
    for moment in killed.MOMENTS:
        assert killed.run(arguments(config, folder), moment) == -signal.SIGKILL, moment
    assert killed.run(arguments(config, folder)) == 0
    assert_same(folder, whole)


@pytest.mark.timeout(900)
def test_killed_at_any_moment(tmp_path):
    config, whole = unbroken(tmp_path, **BY_STEPS)
    folder = tmp_path / "run"
    for _ in range(3):
        process = killed.start(arguments(config, folder))
        before = set(folder.glob("checkpoints/*"))
        while process.is_alive() and set(folder.glob("checkpoints/*")) == before:
            time.sleep(0.01)  # until it trains: killing a process that reads its data would test little
        time.sleep(random.SystemRandom().uniform(0, 0.8))
        process.kill()
        process.join()
    assert killed.run(arguments(config, folder)) == 0
    assert_same(folder, whole)


def test_an_interrupted_run_is_resumed_by_its_own_command_only(tmp_path):
    config = write(tmp_path)
    folder = tmp_path / "run"
    assert killed.run(arguments(config, folder), "before scoring") == -signal.SIGKILL
    before = sorted(folder.rglob("*"))
    other = Experiment.read(config, ["model.order=9"])
    with pytest.raises(InputError, match=r"holds an interrupted run with model.order 8, found 9; repeat its command"):
        train(other, folder, progress=False)
    with (
        FileLock(folder / "checkpoints" / ".lock"),
        pytest.raises(InputError, match="another process is training into"),
    ):
        train(Experiment.read(config), folder, progress=False)
    assert sorted(folder.rglob("*")) == before
    # Moved, and looked at in another way: neither changes what comes out. Begun on another machine: this may, and is said.
    folder.rename(tmp_path / "moved")
    path = tmp_path / "moved" / "checkpoints" / "run.json"
    record = json.loads(path.read_text())
    (begun,) = record["machines"]
    begun["hardware"]["gpus"] = ["another"]
    path.write_text(json.dumps(record))
    result = train(Experiment.read(config, ["training.report_to=none"]), tmp_path / "moved", progress=False)
    assert result["reloaded"]["same"]
    assert result["seconds"]["train"] > 0
    assert result["machines"][0] == {**begun, "from_step": 0}
    assert [machine["hardware"]["gpus"] for machine in result["machines"]] == [["another"], result["hardware"]["gpus"]]


def test_folders_that_are_no_runs(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(InputError, match="is not empty and is left as it is"), running.claim(tmp_path / "mine", {}):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used as a folder"), running.claim(tmp_path / "file", {}):
        pass


def test_failed_runs_leave_nothing(tmp_path):
    with pytest.raises(KeyError), running.claim(tmp_path / "a" / "b", {"processes": 1}):
        raise KeyError
    assert not any(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeyError), running.claim(tmp_path / "empty", {"processes": 1}):
        raise KeyError
    assert not any((tmp_path / "empty").iterdir())


def test_whole_checkpoints(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "trainer_state.json").write_text("{}")
    assert not running.is_whole(tmp_path, 1)
    torch.save({}, tmp_path / "rng_state.pth")
    torch.save({}, tmp_path / "optimizer.pt")
    save_file({"x": torch.zeros(100)}, tmp_path / "model.safetensors")
    assert running.is_whole(tmp_path, 1)
    assert not running.is_whole(tmp_path, 2), "the random states of the second process are missing"
    for name in ("trainer_state.json", "rng_state.pth", "optimizer.pt", "model.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        assert not running.is_whole(tmp_path, 1), name
        (tmp_path / name).write_bytes(content)
