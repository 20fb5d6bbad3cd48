"""One experiment: task -> model -> Trainer -> scores -> result.json and pictures, reloaded and scored again at the end."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, set_seed

from . import running
from .adversarial import LMUTrainingArguments
from .baselines import CONFIGS, class_of
from .card import EXAMPLE, RESULT_FILE
from .errors import InputError, first_line
from .evaluation import EVAL_BATCH, eval_batch, load_model, task_of, verify_in_fresh_process
from .experiment import Experiment
from .finetune import Base
from .kinds import GREATER_IS_BETTER, KINDS, TrainerMetrics, WeightedCrossEntropy, score
from .launched import connected, is_first, on_cpus, processes
from .model.processing_lmu import LMUImageProcessor
from .plots import MAX_CLASSES, draw
from .record import best_epoch, hardware, history, versions
from .reports import check_trackers, report
from .tasks import TaskData
from .tasks.base import PARTS, collate
from .trainer import LMUTrainer

# Settings that change what is seen of a run, not what comes out of it.
_TO_WATCH = ("report_to", "run_name", "disable_tqdm", "project")

_DEFAULTS: dict[str, Any] = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "logging_strategy": "epoch",
    "load_best_model_at_end": True,
    "save_total_limit": 1,
    "per_device_eval_batch_size": EVAL_BATCH,
    "batch_eval_metrics": True,
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}


def train(
    experiment: Experiment,
    output_dir: str | Path | None = None,
    data: str | None = None,
    *,
    base_model: str | None = None,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Trains, keeps the best epoch of the validation part, scores it once on the test part, saves and verifies.

    A run that was stopped, even by force, goes on where it was if it is started again with the same arguments, and ends with
    the same weights and the same history. Under torchrun or ``accelerate launch`` all processes train one model.

    Args:
        experiment: what to run.
        output_dir: folder for model, processor and ``result.json``: new, empty, or that of the same run, interrupted;
            ``runs/NAME`` when None.
        data: local file or folder, or id of a dataset on the Hub, where the task needs one.
        base_model: folder of a model, or its id on the Hub, to begin with; None for new weights.
        progress: show a progress bar.

    Returns:
        The content of ``result.json``; None on all processes but the first.

    Raises:
        InputError: the folder is in use, or configuration or data are wrong.
    """
    described = experiment.to_dict()
    for name in _TO_WATCH:
        described["training"].pop(name, None)
    record = {
        "experiment": described,
        "data": str(Path(data).resolve()) if data is not None and Path(data).exists() else data,
        "model": base_model,
        "processes": processes(),
    }
    together = connected(experiment.training.get("use_cpu", False))
    with together, running.claim(output_dir or running.free_output_dir(experiment.name), record) as run:
        if run.result is None:
            return _train(experiment, run, data, base_model, progress)
        run.finish()
        return run.result


def _train(
    experiment: Experiment, run: running.Run, data: str | None, base_model: str | None, progress: bool
) -> dict[str, Any] | None:
    started = time.perf_counter()
    output_dir = run.folder
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("pictures: need matplotlib; install lmu-hf[train]")  # now, not after an hour of training
    base = None if base_model is None else Base(base_model)
    task = task_of(experiment, data, None if base is None else base.processor)
    kind = KINDS[task.kind]
    set_seed(experiment.seed)
    model = build_model(experiment, task, base)
    trainer = build_trainer(model, experiment, task, run, progress)
    book = running.Bookkeeping(run)
    trainer.add_callback(book)
    if run.checkpoint is not None and is_first():
        print(f"goes on after step {run.step}, from the last checkpoint of the interrupted run", flush=True)

    _fit(trainer, run.checkpoint)
    train_seconds = book.seconds
    trainer.save_model(str(output_dir))
    if processes() > 1:
        # From here on the first works alone: whatever waits for the others, such as loading under FSDP, would wait for ever.
        torch.distributed.destroy_process_group()
    if not trainer.is_world_process_zero():
        return None
    (output_dir / "training_args.bin").unlink(missing_ok=True)  # a pickle; result.json holds what matters, readably
    task.processor.save_pretrained(output_dir)
    if processes() > 1:
        # As it was saved: the weights may lie in pieces on all processes, and the others are done.
        saved: Any = load_model(output_dir)[0]
        model = saved.to(trainer.args.device)
    # By the same function as `evaluate`: the Trainer's loss would include penalties and label smoothing.
    scored = {part: score(model, task.parts[part], kind, eval_batch(experiment), task.every) for part in PARTS[1:]}
    scores = {part: {name: values[name] for name in kind.metrics} for part, values in scored.items()}

    result: dict[str, Any] = {
        "name": experiment.name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kind": kind.name,
        **({} if base is None else base.record),
        "dataset": task.dataset,
        "scores": scores,
        "chosen_by": str(trainer.args.metric_for_best_model).removeprefix("eval_"),
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
    if len(run.machines) > 1 or run.machines[0]["from_step"]:
        result["machines"] = run.machines  # it went on elsewhere
    if processes() > 1:
        result["processes"] = processes()
    if task.class_weights is not None:
        result["class_weights"] = dict(zip(task.label_names, task.class_weights, strict=True))
    if "confusion" in scored["test"] and len(task.label_names) <= MAX_CLASSES:
        result["confusion"] = {"labels": task.label_names, "test": scored["test"]["confusion"]}
    if "predictions" in scored["test"]:
        result["predictions"] = {"labels": task.label_names, **scored["test"]["predictions"]}
        if len(task.label_names) > 1:
            result["targets"] = {part: values["targets"] for part, values in scored.items()}
    if task.dataset["id"] is not None and isinstance(task.processor, LMUImageProcessor) and kind.name == "classification":
        # Of public data only: a row of somebody's own is theirs to publish.
        row = task.parts["test"][0]
        task.processor.image(row["input_values"]).save(output_dir / EXAMPLE)
        result["example"] = {"file": EXAMPLE, "label": task.label_names[int(row["labels"])]}
    running.write_json(output_dir / RESULT_FILE, result)
    draw(result, output_dir)
    result["reloaded"] = verify_in_fresh_process(output_dir, data, scores["test"])
    result["seconds"]["total"] = round(run.seconds + time.perf_counter() - started, 2)
    running.write_json(output_dir / RESULT_FILE, result)
    run.finish()
    return result


def _fit(trainer: LMUTrainer, checkpoint: Path | None) -> None:
    """Trains; what a machine cannot do is told as wrong input."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except TorchDynamoException as error:
        raise InputError(
            f"training.torch_compile: could not compile the model here ({first_line(error)}); leave it out, or "
            "install a compiler"
        ) from error
    except ImportError as error:  # of an optimizer, say; its message names the package
        raise InputError(f"training: {first_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"training.per_device_train_batch_size: {trainer.args.per_device_train_batch_size} rows at once do not fit into the "
            "device's memory; take fewer, and more of training.gradient_accumulation_steps"
        ) from error


def build_model(experiment: Experiment, task: TaskData, base: Base | None = None) -> PreTrainedModel:
    """The model of an experiment, new or from a checkpoint, with the loss of the task.

    Raises:
        InputError: a field has a wrong value, or contradicts data or checkpoint.
    """
    kind = KINDS[task.kind]
    if base is None:
        config = build_config(experiment, task)
        model = class_of(config, kind.head)(config)
    else:
        model = base.build(experiment, task)
    if task.class_weights is not None:
        if experiment.training.get("label_smoothing_factor"):
            raise InputError("task.class_weights: not together with training.label_smoothing_factor; leave one of them out")
        model.loss_function = WeightedCrossEntropy(task.class_weights)
    return model


def build_config(experiment: Experiment, task: TaskData) -> PreTrainedConfig:
    """The model's configuration with what the task decides: input size, labels, what is predicted.

    Raises:
        InputError: a field has a wrong value, or contradicts the data.
    """
    fields = dict(experiment.model)
    if task.input_size is not None and fields.setdefault("input_size", task.input_size) != task.input_size:
        raise InputError(
            f"model.input_size: the data has {task.input_size} features per step, found {fields['input_size']}; leave it out"
        )
    if fields.get("vocab_size") is not None:
        why = "the tokenizer decides it" if "vocab_size" in task.fields else "the tasks give continuous signals, not tokens"
        raise InputError(f"model.vocab_size: {why}; leave it out")
    for name, value in KINDS[task.kind].fields(task).items():
        if fields.setdefault(name, value) != value:
            raise InputError(f"model.{name}: the task {task.name} needs {value!r}, found {fields[name]!r}; leave it out")
    model_type = fields.pop("model_type", "lmu")
    try:
        return CONFIGS[model_type](**fields)
    except Exception as error:  # ValueError, or one of huggingface_hub's for a wrong type
        raise InputError(f"model.{' '.join(str(error).split())}") from error


def build_trainer(
    model: PreTrainedModel | None,
    experiment: Experiment,
    task: TaskData,
    run: running.Run,
    progress: bool,
    model_init: Callable[..., PreTrainedModel] | None = None,
) -> LMUTrainer:
    """The Trainer of an experiment.

    Args:
        model: to train; None with ``model_init``.
        experiment: whose settings it takes.
        task: whose parts it trains and validates on.
        run: whose folder it writes into.
        progress: a bar rather than lines.
        model_init: makes the model of a trial of a search.

    Raises:
        InputError: LMUTrainingArguments refuses a value.
    """
    kind = KINDS[task.kind]
    settings = {
        **_DEFAULTS,
        "metric_for_best_model": kind.best,
        "disable_tqdm": not progress,
        "run_name": f"{experiment.name}-seed{experiment.seed}",
        **({"use_cpu": True} if on_cpus() else {}),
        **task.training(experiment.training),
        **experiment.training,
    }
    metric = settings["metric_for_best_model"].removeprefix("eval_")
    if metric not in (known := (*kind.metrics, "loss")):
        raise InputError(f"training.metric_for_best_model: expected one of {sorted(set(known))}, found {metric!r}")
    settings.setdefault("greater_is_better", metric in GREATER_IS_BETTER)
    check_trackers(settings["report_to"])
    try:
        arguments = LMUTrainingArguments(
            output_dir=str(run.checkpoints), seed=experiment.seed, data_seed=experiment.seed, **settings
        )
        trainer = LMUTrainer(
            model=model,
            model_init=model_init,
            args=arguments,
            train_dataset=task.parts["train"],
            eval_dataset=task.parts["validation"],
            data_collator=collate,
            compute_metrics=TrainerMetrics(kind, task.label_names),
        )
    except Exception as error:  # transformers checks settings by many kinds of errors; none has trained anything yet
        raise InputError(f"training: {' '.join(str(error).split())}") from error
    report(trainer, kind, progress, run.folder)
    return trainer
