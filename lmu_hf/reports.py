"""What a run tells while it trains: a line or a bar on the terminal, and the trackers that it was asked to report to."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from .errors import InputError
from .kinds import Kind

# What to install, where it is not called like the tracker.
_PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "dvclive": "dvclive"}


def check_trackers(report_to: Any) -> None:
    """Raises InputError if a tracker is unknown, or its package is not installed."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(f"training.report_to: expected some of {sorted(INTEGRATION_TO_CALLBACK)}, found {name!r}")
        if name in ("tensorboard", "trackio", "wandb") and importlib.util.find_spec(name) is None:
            package = _PACKAGES.get(name, name)
            raise InputError(f"training.report_to: {name} is not installed; pip install {package}")


def report(trainer: Trainer, kind: Kind, progress: bool, output_dir: Path) -> None:
    """Gives a trainer its bar or its lines, and TensorBoard a folder that stays.

    Args:
        trainer: to report on.
        kind: of its task.
        progress: a bar rather than a line per epoch.
        output_dir: folder of the run.
    """
    # One line or one bar with the scores, in place of dictionaries of numbers; result.json holds them all.
    trainer.remove_callback(ProgressCallback if progress else PrinterCallback)
    trainer.add_callback(EpochBar(kind) if progress else EpochLine(kind))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            # By default it writes beside the checkpoints, which go when the run is complete.
            callback.logging_dir = str(output_dir / "tensorboard")


class EpochLine(TrainerCallback):
    """One line per epoch, for logs."""

    def __init__(self, kind: Kind):
        self.kind = kind

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scores = _scores(self.kind, kwargs.get("metrics") or {})
        losses = [log["loss"] for log in state.log_history if "loss" in log]
        if state.is_world_process_zero and scores and losses:
            # Epochs of a stream have no number before they end.
            where = (
                f"epoch {state.epoch:g} of {state.num_train_epochs}" if args.max_steps < 0 else f"step {state.global_step}"
            )
            print(f"{where}: loss {losses[-1]:.4f}, validation {scores}", flush=True)


class EpochBar(ProgressCallback):
    """The progress bar of transformers with the latest scores on it instead of lines of logs under it."""

    def __init__(self, kind: Kind):
        super().__init__()
        self.kind = kind

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No bar of its own for each evaluation."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scores = _scores(self.kind, kwargs.get("metrics") or {})
        if self.training_bar is not None and scores:
            self.training_bar.set_postfix_str(f"epoch {state.epoch:g}, validation {scores}")

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the scores are on the bar."""


def _scores(kind: Kind, metrics: dict[str, float]) -> str:
    names = dict.fromkeys(("loss", *kind.metrics))
    return ", ".join(f"{name} {metrics[f'eval_{name}']:.4f}" for name in names if f"eval_{name}" in metrics)
