"""transformers' Trainer, with a ``push_to_hub`` that publishes the model and nothing else."""

from __future__ import annotations

import importlib.util
import logging
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy

from . import hub
from .adversarial import SIGNAL, signal_of, steepest_step
from .errors import HubError, InputError
from .plots import draw
from .record import TIMING, best_epoch, hardware, history, versions

logger = logging.getLogger(__name__)

# What a reader needs to train it again; the other hundred arguments are of the machine or the moment.
_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "label_smoothing_factor",
    "adversarial_radius",
    "adversarial_weight",
    "bf16",
    "fp16",
    "seed",
)


class LMUTrainer(Trainer):
    """transformers' Trainer, with the same arguments, and a ``push_to_hub`` that is safe and describes the run.

    The Trainer of transformers uploads whatever lies in ``output_dir``. That includes ``training_args.bin``, a pickle of all
    arguments with local paths and, if it was given as one, ``hub_token`` in clear. It also replaces the card by a draft. Here
    the pickle is not kept, only what :data:`lmu_hf.hub.PUBLISHED` lists is sent, and the card is made from the run.

    In time series it counts the values that are known. transformers' own Trainer divides the loss by the number of all, NaN
    and padding included, and so reports too little.

    With :class:`lmu_hf.adversarial.LMUTrainingArguments` it can train on inputs that are moved against it.

    Raises:
        ValueError: ``hub_strategy`` asks to publish whole checkpoints, which hold the state of the optimizer.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        arguments = kwargs.get("args", args[1] if len(args) > 1 else None)
        whole = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        if arguments is not None and arguments.push_to_hub and arguments.hub_strategy in whole:
            raise ValueError(
                f"hub_strategy: expected 'end' or 'every_save', found {arguments.hub_strategy.value!r}, which would publish the "
                "state of the optimizer"
            )
        super().__init__(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        model: Any = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "forecast"):
            # transformers counts every number that is not -100, also those that are not known, or padded.
            batch_samples = [_known(batch, every=model.config.return_sequences) for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        radius = getattr(self.args, "adversarial_radius", 0.0)
        if not (radius and model.training):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weight = self.args.adversarial_weight  # type: ignore[attr-defined]
        signal = signal_of(inputs).detach().requires_grad_()
        loss, outputs = super().compute_loss(model, {**inputs, SIGNAL: signal}, True, num_items_in_batch)
        step = steepest_step(loss, signal, radius, keep_graph=weight < 1)
        moved = {**inputs, SIGNAL: signal.detach() + step}
        loss_there = super().compute_loss(model, moved, num_items_in_batch=num_items_in_batch)
        loss = weight * loss_there + ((1 - weight) * loss if weight < 1 else 0)
        return (loss, outputs) if return_outputs else loss

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        license: str | None = None,
        dataset: str | None = None,
        tags: list[str] | None = None,
    ) -> hub.Published | CommitInfo | None:
        """Saves and publishes the model, its processor and its card.

        Args:
            commit_message: of the commit.
            blocking: must be True.
            token: of the Hub; ``args.hub_token``, or the stored one, when None.
            revision: branch; ``args.hub_revision`` when None.
            private: make the repository private; ``args.hub_private_repo`` when None.
            license: identifier of the weights' licence.
            dataset: what the model was trained on, a name or an id on the Hub, for the card.
            tags: more tags for the card.

        Returns:
            What was published; None on all processes but the first.

        Raises:
            InputError: name, token or rights are wrong, or the model cannot be published.
            HubError: the Hub could not be reached or failed.
        """
        if not blocking:
            raise ValueError("blocking: expected True; the upload is done when this returns")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        result = self.record()
        if dataset is not None:
            result["dataset"] |= {"name": dataset, "id": dataset if "/" in dataset else None}
        result["tags"] = list(tags or ())
        if importlib.util.find_spec("matplotlib") is not None:
            draw(result, str(self.args.output_dir))
        return self._publish(
            self.args.output_dir,
            token=token,
            revision=revision,
            private=private,
            license=license,
            result=result,
            message=commit_message or "End of training",
        )

    def record(self) -> dict[str, Any]:
        """What is known of the run, in the form of a ``result.json``."""
        logs: list[dict[str, Any]] = self.state.log_history
        best = best_epoch(self)
        scored = [log for log in logs if "eval_loss" in log and (best is None or log["epoch"] == best)]
        scores = {
            name.removeprefix("eval_"): value
            for name, value in (scored[-1] if scored else {}).items()
            if name.startswith("eval_") and name not in TIMING and isinstance(value, int | float)
        }
        parts: dict[str, Any] = {"train": self.train_dataset, "validation": self.eval_dataset}
        config: Any = self.accelerator.unwrap_model(self.model).config
        arguments = self.args.to_dict()
        runtime = next((log["train_runtime"] for log in reversed(logs) if "train_runtime" in log), None)
        return {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            # Only what came from the Hub has a commit; a local folder is nobody else's base.
            "base_model": config._name_or_path if getattr(config, "_commit_hash", None) else None,
            "dataset": {"rows": {name: len(part) for name, part in parts.items() if hasattr(part, "__len__")}},
            "scores": {"validation": scores},
            "best_epoch": best,
            "settings": {name: arguments[name] for name in _SETTINGS if arguments.get(name) not in (None, "")},
            "history": history([log for log in logs if "epoch" in log]),
            "seconds": {} if runtime is None else {"train": round(runtime, 2)},
            "hardware": hardware(),
            "versions": versions(),
        }

    def _publish(self, folder: Any, token: str | None = None, **kwargs: Any) -> hub.Published:
        private, revision = kwargs.pop("private", None), kwargs.pop("revision", None)
        return hub.push(
            folder,
            self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name,
            private=bool(self.args.hub_private_repo if private is None else private),
            revision=self.args.hub_revision if revision is None else revision,
            token=token or self.args.hub_token,
            **kwargs,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            self._publish(checkpoint_folder, message=f"Training in progress, step {self.state.global_step}", card=False)
        except (InputError, HubError) as error:
            # Hours of training are not thrown away for that; the push at the end raises.
            logger.warning("step %d was not published: %s", self.state.global_step, error)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            Path(str(output_dir or self.args.output_dir), TRAINING_ARGS_NAME).unlink(missing_ok=True)


def _known(batch: Any, every: bool) -> Any:
    """A batch of time series for counting its labels, with -100 at those that do not count; ``every``: one per step."""
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor):
        return batch
    known, mask = ~labels.isnan(), batch.get("attention_mask")
    if every and mask is not None:
        known = known & mask.bool().view(*mask.shape, *[1] * (labels.ndim - 2))
    return {**batch, "labels": torch.where(known, 0, -100)}
