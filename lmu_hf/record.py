"""What the record of a run says of the machine, the versions and the epochs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import __version__

if TYPE_CHECKING:
    from transformers import Trainer

# What the Trainer logs among the scores.
TIMING = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
_VERSIONS_OF = ("torch", "transformers", "datasets", "accelerate", "safetensors", "huggingface_hub", "numpy")

_NUMBERS = re.compile(r"\[\n\s+((?:(?:-?\d[\d.e+-]*|null),\n\s+)*(?:-?\d[\d.e+-]*|null))\n\s+\]")


def as_text(content: dict[str, Any]) -> str:
    """A record as JSON that people can read: indented, and lists of numbers on one line each."""
    # A string of JSON holds no line break, so what is matched is structure.
    joined = _NUMBERS.sub(lambda match: "[" + " ".join(match[1].split()) + "]", json.dumps(content, indent=2))
    return joined + "\n"


def hardware() -> dict[str, Any]:
    """The machine, in the words that a reader needs to judge a time."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads(), "gpus": devices}


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    return {
        "lmu_hf": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _VERSIONS_OF},
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux; the general name has to do
    return platform.processor() or platform.machine()


def best_epoch(trainer: Trainer) -> float | None:
    """The epoch whose weights were kept; None where it is the last one whatever its score."""
    if not trainer.args.load_best_model_at_end:
        return None
    step = trainer.state.best_global_step
    epochs = [log["epoch"] for log in trainer.state.log_history if log["step"] == step and "eval_loss" in log]
    return epochs[0] if epochs else None


def history(logs: list[dict[str, float]]) -> list[dict[str, float]]:
    """One entry per epoch: training loss and learning rate, validation loss and whatever scores there are."""
    epochs: dict[float, dict[str, float]] = {}
    for log in logs:
        entry = epochs.setdefault(log["epoch"], {"epoch": log["epoch"]})
        if "loss" in log:
            entry |= {"train_loss": log["loss"], "learning_rate": log["learning_rate"]}
        if "eval_loss" in log and "loss" not in entry:
            entry |= {
                name.removeprefix("eval_"): value
                for name, value in log.items()
                if name.startswith("eval_") and name not in TIMING and isinstance(value, int | float)
            }
    return list(epochs.values())
