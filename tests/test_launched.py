"""Two processes on one machine (gloo) train what one process trains, and only the first says or writes anything."""

import json
import os
import sys

import numpy as np
import processes
import pytest

from lmu_hf.experiment import Experiment
from lmu_hf.launched import lone_environment
from lmu_hf.training import train

# No dropout: each process has random numbers of its own. Only full batches of training rows: two processes fill up the last one.
CONFIG = {
    "name": "waves-two",
    "task": {"name": "signals"},
    "model": {"order": 8, "theta": 20, "hidden_size": 20, "hidden_cell": "dense", "hidden_act": "tanh"},
    "training": {"num_train_epochs": 3, "learning_rate": 0.01, "per_device_train_batch_size": 32},
}
# Of the validation rows too: where the last batch is filled up, transformers' own mean of the losses counts some rows twice.
ROWS = {"train": 320, "validation": 48, "test": 33}


def write(folder):
    rng = np.random.default_rng(0)
    (folder / "config.yaml").write_text(json.dumps({**CONFIG, "training": {**CONFIG["training"]}}))
    (folder / "data").mkdir()
    for part, count in ROWS.items():
        rows = []
        for index in range(count):
            steps = np.arange(12 + index % 9)
            rows.append(
                {"signal": (np.sin(steps / (2 + index % 3)) + rng.normal(0, 0.3, len(steps))).tolist(), "label": index % 3}
            )
        (folder / "data" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def launch(launcher, *arguments, **kwargs):
    command = [sys.executable, "-m", *launcher, "-m", "lmu_hf.cli", *map(str, arguments)]
    return processes.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs)


TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d")
TORCHRUN += ("--rdzv-endpoint", "localhost:0")
# --multi_gpu means several processes; with --cpu, accelerate wants MPI for that.
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
ACCELERATE += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")


@pytest.mark.parametrize(
    ("launcher", "settings"),
    [(TORCHRUN, []), (ACCELERATE, ["training.adversarial_radius=0.5"])],
    ids=["torchrun", "accelerate, adversarial"],
)
def test_two_processes_are_like_one(launcher, settings, tmp_path):
    write(tmp_path)
    one = train(
        Experiment.read(tmp_path / "config.yaml", settings), tmp_path / "one", str(tmp_path / "data"), progress=False
    )
    half = [*settings, "training.per_device_train_batch_size=16", "training.per_device_eval_batch_size=8"]
    # No --output: the processes agree on a folder.
    finished = launch(launcher, "train", "config.yaml", *half, "--data", "data", "--no-progress", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = [line for line in finished.stdout.splitlines() if line.strip()]
    assert len([line for line in lines if line.startswith("epoch")]) == 3, finished.stdout
    assert len([line for line in lines if "training into" in line]) == 1
    folder = tmp_path / "runs" / "waves-two"
    assert [path.name for path in folder.parent.iterdir()] == ["waves-two"]
    two = json.loads((folder / "result.json").read_text())
    assert two["processes"] == 2
    assert two["reloaded"]["same"]
    assert len(two["history"]) == len(one["history"]) == 3
    for ours, theirs in zip(two["history"], one["history"], strict=True):
        # The same sums in another order: float32 rounding, carried through 30 steps.
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=1 / 48)
    assert two["scores"]["test"]["loss"] == pytest.approx(one["scores"]["test"]["loss"], rel=1e-4)
    assert two["dataset"]["rows"] == one["dataset"]["rows"]
    assert not (folder / "checkpoints").exists()


def test_what_is_wrong_is_said_once(tmp_path):
    finished = launch(TORCHRUN, "train", "model.order=0", cwd=tmp_path)
    assert finished.returncode != 0
    assert finished.stderr.count("lmu-hf: model.order") == 1, finished.stderr
    assert not any(tmp_path.iterdir())


def test_a_process_of_our_own_is_none_of_the_launchers(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("HF_HOME", "kept")
    environment = lone_environment()
    assert not {"WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"} & set(environment)
    assert environment["HF_HOME"] == "kept"
