"""One experiment, from a configuration to a trained model that has been reloaded and scored, and its result.json."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    EvalPrediction,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from .card import EXAMPLE, RESULT_FILE
from .errors import InputError
from .experiment import Experiment
from .model.configuration_lmu import LMUConfig
from .model.modeling_heads import LMUForSequenceClassification
from .model.processing_lmu import LMUFeatureExtractor, LMUImageProcessor
from .plots import MAX_CLASSES, draw
from .record import best_epoch, hardware, history, versions
from .tasks import TaskData, load_task
from .tasks.base import PARTS, collate

ALL = "all"
_CHECKPOINTS = "checkpoints"

_DEFAULTS: dict[str, Any] = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "logging_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
    "save_total_limit": 1,
    "per_device_eval_batch_size": 500,
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}


def train(
    experiment: Experiment, output_dir: str | Path, data: str | None = None, *, progress: bool = True
) -> dict[str, Any]:
    """Trains, keeps the best epoch of the validation part, scores it once on the test part, saves and verifies.

    Args:
        experiment: what to run.
        output_dir: folder for model, processor and ``result.json``; must not exist or be empty.
        data: local file or folder, or id of a dataset on the Hub, where the task needs one.
        progress: show a progress bar.

    Returns:
        The content of ``result.json``.

    Raises:
        InputError: the folder is in use, or configuration or data are wrong.
    """
    output_dir = Path(output_dir)
    made = make_output_dir(output_dir)
    try:
        return _train(experiment, output_dir, data, progress)
    except BaseException:
        # A run that failed before it had anything to keep leaves nothing behind, so that the next may use the folder.
        if not list(output_dir.glob(f"{_CHECKPOINTS}/checkpoint-*")) and not (output_dir / "config.json").exists():
            shutil.rmtree(output_dir / _CHECKPOINTS, ignore_errors=True)
            if made is not None:
                shutil.rmtree(made, ignore_errors=True)
        raise


def _train(experiment: Experiment, output_dir: Path, data: str | None, progress: bool) -> dict[str, Any]:
    started = time.perf_counter()
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("pictures: need matplotlib; install lmu-hf[train]")  # now, not after an hour of training
    task = _load_task(experiment, data)
    config = build_config(experiment, task)
    set_seed(experiment.seed)
    model = LMUForSequenceClassification(config)
    trainer = build_trainer(model, experiment, task, output_dir, progress)

    before = time.perf_counter()
    trainer.train()
    train_seconds = time.perf_counter() - before
    # By the same function as `evaluate`: the Trainer's loss would include penalties and label smoothing.
    scored = {part: score(model, task.parts[part]) for part in PARTS[1:]}
    scores = {part: {name: values[name] for name in ("accuracy", "loss")} for part, values in scored.items()}
    trainer.save_model(str(output_dir))
    (output_dir / "training_args.bin").unlink(missing_ok=True)  # a pickle; result.json holds what matters, readably
    task.processor.save_pretrained(output_dir)

    result: dict[str, Any] = {
        "name": experiment.name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dataset": task.dataset,
        "scores": scores,
        "best_epoch": best_epoch(trainer),
        "parameters": {
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "total": sum(p.numel() for p in model.parameters()),
        },
        "experiment": experiment.to_dict(),
        "history": history(trainer.state.log_history),
        "seconds": {"train": round(train_seconds, 2)},
        "hardware": hardware(),
        "versions": versions(),
    }
    if len(task.label_names) <= MAX_CLASSES:
        result["confusion"] = {"labels": task.label_names, "test": scored["test"]["confusion"]}
    if task.dataset["id"] is not None and isinstance(task.processor, LMUImageProcessor):
        # Of public data only: a row of somebody's own is theirs to publish.
        row = task.parts["test"][0]
        task.processor.image(row["input_values"]).save(output_dir / EXAMPLE)
        result["example"] = {"file": EXAMPLE, "label": task.label_names[int(row["labels"])]}
    _write(output_dir, result)
    draw(result, output_dir)
    result["reloaded"] = verify_in_fresh_process(output_dir, data, scores["test"])
    result["seconds"]["total"] = round(time.perf_counter() - started, 2)
    _write(output_dir, result)
    shutil.rmtree(output_dir / _CHECKPOINTS, ignore_errors=True)
    return result


def make_output_dir(output_dir: Path) -> Path | None:
    """Makes the folder, with its parents; returns the outermost one made, None if it was there.

    Raises:
        InputError: it cannot be made, or holds anything: nothing that is there is ever overwritten.
    """
    try:
        made = next((path for path in (*reversed(output_dir.parents), output_dir) if not path.exists()), None)
        if made is None and any(output_dir.iterdir()):
            found = "already holds a model" if (output_dir / "config.json").exists() else "is not empty"
            raise InputError(f"output: {output_dir} {found} and is left as it is; choose another folder with --output")
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output: {str(output_dir)[:80]} cannot be used as a folder: {error.strerror}") from error
    return made


def free_output_dir(name: str, root: str | Path = "runs") -> Path:
    """The first of ``runs/name``, ``runs/name-2``, ... that does not exist."""
    candidate = Path(root) / name
    number = 2
    while candidate.exists():
        candidate = Path(root) / f"{name}-{number}"
        number += 1
    return candidate


def build_config(experiment: Experiment, task: TaskData) -> LMUConfig:
    """The model's configuration with what the task decides: input size and labels.

    Raises:
        InputError: a field has a wrong value, or contradicts the data.
    """
    fields = dict(experiment.model)
    if fields.setdefault("input_size", task.input_size) != task.input_size:
        raise InputError(
            f"model.input_size: the data has {task.input_size} features per step, found {fields['input_size']}; leave it out"
        )
    if fields.get("vocab_size") is not None:
        raise InputError("model.vocab_size: the tasks give continuous signals, not tokens; leave it out")
    id2label = dict(enumerate(task.label_names))
    try:
        return LMUConfig(
            **fields,
            problem_type="single_label_classification",
            id2label=id2label,
            label2id={name: index for index, name in id2label.items()},
        )
    except Exception as error:  # ValueError, or one of huggingface_hub's for a wrong type
        raise InputError(f"model.{' '.join(str(error).split())}") from error


def build_trainer(
    model: LMUForSequenceClassification, experiment: Experiment, task: TaskData, output_dir: Path, progress: bool
) -> Trainer:
    """The Trainer of an experiment.

    Raises:
        InputError: TrainingArguments refuses a value.
    """
    settings = {**_DEFAULTS, "disable_tqdm": not progress, **experiment.training}
    if settings["metric_for_best_model"].removeprefix("eval_") == "loss":
        settings.setdefault("greater_is_better", False)
    try:
        arguments = TrainingArguments(
            output_dir=str(output_dir / _CHECKPOINTS), seed=experiment.seed, data_seed=experiment.seed, **settings
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=task.parts["train"],
            eval_dataset=task.parts["validation"],
            data_collator=collate,
            compute_metrics=accuracy,
        )
    except Exception as error:  # transformers checks settings by many kinds of errors; none has trained anything yet
        raise InputError(f"training: {' '.join(str(error).split())}") from error
    # One line or one bar with the scores, in place of dictionaries of numbers; result.json holds them all.
    trainer.remove_callback(ProgressCallback if progress else PrinterCallback)
    trainer.add_callback(_EpochBar if progress else _EpochLine)
    return trainer


class _EpochLine(TrainerCallback):
    """One line per epoch, for logs."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics = kwargs.get("metrics") or {}
        losses = [log["loss"] for log in state.log_history if "loss" in log]
        if state.is_world_process_zero and "eval_accuracy" in metrics and losses:
            print(
                f"epoch {state.epoch:g} of {state.num_train_epochs}: loss {losses[-1]:.4f}, validation loss "
                f"{metrics['eval_loss']:.4f}, accuracy {metrics['eval_accuracy']:.4f}",
                flush=True,
            )


class _EpochBar(ProgressCallback):
    """The progress bar of transformers with the latest scores on it instead of lines of logs under it."""

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """No bar of its own for each evaluation."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        metrics = kwargs.get("metrics") or {}
        if self.training_bar is not None and "eval_accuracy" in metrics:
            self.training_bar.set_postfix_str(
                f"epoch {state.epoch:g}, validation accuracy {metrics['eval_accuracy']:.4f}, loss {metrics['eval_loss']:.4f}"
            )

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the scores are on the bar."""


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of rows whose largest logit is at the label."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((np.argmax(logits, axis=-1) == prediction.label_ids).mean())}


def evaluate(model_dir: str | Path, part: str = "test", data: str | None = None) -> dict[str, Any]:
    """Scores a saved model on a part of the task that it was trained for.

    Args:
        model_dir: folder of the model, with its ``result.json``.
        part: "train", "validation", "test", or "all" for every row of the data.
        data: as for :func:`train`.

    Returns:
        task, part, labels, accuracy, loss, rows, and the confusion matrix (true class by predicted class).

    Raises:
        InputError: the folder holds no such model, or the data is wrong.
    """
    if part not in (*PARTS, ALL):
        raise InputError(f"part: expected one of {[*PARTS, ALL]}, found {part!r}")
    model, processor = load_model(model_dir)
    path = Path(model_dir) / RESULT_FILE
    if not path.is_file():
        raise InputError(f"model: {model_dir} has no {RESULT_FILE}, which names the task; evaluate needs one")
    try:
        experiment = Experiment.from_dict(json.loads(path.read_text(encoding="utf-8"))["experiment"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"model: {path} is damaged: {' '.join(str(error).split())}") from error
    task = _load_task(experiment, data, processor)
    if task.input_size != model.config.input_size:
        raise InputError(
            f"data: expected {model.config.input_size} features per step, as the model was trained on, found {task.input_size}"
        )
    if (names := model.config.label_names) != task.label_names:
        raise InputError(f"data: expected the labels {names} that the model was trained on, found {task.label_names}")
    return {"task": task.name, "part": part, "labels": names, **score(model, _part(task, part))}


def _load_task(experiment: Experiment, data: str | None, processor: Any = None) -> TaskData:
    options = {key: value for key, value in experiment.task.items() if key != "name"}
    return load_task(experiment.task["name"], data, processor, **options)


def _part(task: TaskData, part: str) -> torch.utils.data.Dataset:
    return torch.utils.data.ConcatDataset(task.parts.values()) if part == ALL else task.parts[part]


@torch.inference_mode()
def score(model: LMUForSequenceClassification, part: Any, batch_size: int = 500) -> dict[str, Any]:
    """Accuracy, mean cross-entropy and confusion matrix (true class by predicted class) of a model on a dataset."""
    model.eval()
    classes = len(model.config.label_names)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    loss = 0.0
    for batch in torch.utils.data.DataLoader(part, batch_size=batch_size, collate_fn=collate):
        batch = {name: value.to(model.device) for name, value in batch.items()}
        labels = batch.pop("labels")
        logits = model(**batch).logits.float()
        loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        pairs = labels * classes + logits.argmax(-1)
        confusion += torch.bincount(pairs.cpu(), minlength=classes * classes).view(classes, classes)
    rows = len(part)
    return {
        "accuracy": float(confusion.diagonal().sum()) / rows,
        "loss": loss / rows,
        "rows": rows,
        "confusion": confusion.tolist(),
    }


def load_model(model_dir: str | Path) -> tuple[LMUForSequenceClassification, Any]:
    """Loads a classifier and its processor from a folder (or the Hub).

    Raises:
        InputError: there is no LMU classifier there.
    """
    path = Path(model_dir)
    if path.exists() and not (path / "config.json").is_file():
        raise InputError(f"model: {model_dir} holds no config.json; give the folder of a trained model")
    try:
        loaded: Any = LMUForSequenceClassification.from_pretrained(str(model_dir), output_loading_info=True)
        model, report = loaded
        processor = load_processor(model_dir)
    except Exception as error:  # a damaged file can raise anything; each means that there is no usable model
        raise InputError(f"model: {model_dir} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report.get(problem):
            names = ", ".join(str(name) for name in sorted(report[problem])[:3])
            raise InputError(f"model: {model_dir}: weights and config.json do not fit, {problem.replace('_', ' ')} {names}")
    return model.eval(), processor


def load_processor(model_dir: str | Path) -> LMUImageProcessor | LMUFeatureExtractor:
    """The processor saved beside a model; by our own classes, as AutoProcessor may want torchvision for images."""
    try:
        return LMUImageProcessor.from_pretrained(str(model_dir))
    except ValueError:  # it is one for signals, and says so
        return LMUFeatureExtractor.from_pretrained(str(model_dir))


def verify_in_fresh_process(model_dir: Path, data: str | None, expected: dict[str, float]) -> dict[str, Any]:
    """Reloads a model in a new Python process and checks that it scores the same on the test part.

    Raises:
        RuntimeError: it does not.
    """
    command = [sys.executable, "-m", "lmu_hf.cli", "evaluate", str(model_dir), "--json"]
    command += [] if data is None else ["--data", data]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"the saved model could not be evaluated in a fresh process:\n{finished.stderr[-2000:]}")
    found = json.loads(finished.stdout.strip().splitlines()[-1])
    # The same function on the same machine; threads may add up float32 in another order.
    same = found["accuracy"] == expected["accuracy"] and abs(found["loss"] - expected["loss"]) < 1e-5 * (
        1 + expected["loss"]
    )
    if not same:
        raise RuntimeError(f"the reloaded model scores differently: expected {expected}, found {found}")
    return {"accuracy": found["accuracy"], "loss": found["loss"], "same": True}


def _write(output_dir: Path, result: dict[str, Any]) -> None:
    # Written beside and moved into place: a run that is killed here leaves the old file or the new one, never half of one.
    temporary = output_dir / f".{RESULT_FILE}"
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(output_dir / RESULT_FILE)
