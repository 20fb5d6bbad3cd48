"""Saved models: loaded, scored on their task, and checked in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from .baselines import class_of
from .card import RESULT_FILE
from .errors import InputError
from .experiment import Experiment
from .kinds import KINDS, same_labels, score
from .launched import lone_environment
from .model.processing_lmu import LMUFeatureExtractor, LMUImageProcessor
from .tasks import TaskData, load_task
from .tasks.base import PARTS

ALL = "all"
EVAL_BATCH = 500

_HEADS = {kind.head.__name__: kind.head for kind in KINDS.values()}


def evaluate(
    model_dir: str | Path,
    part: str = "test",
    data: str | None = None,
    config: str | Path | None = None,
    overrides: list[str] | None = None,
) -> dict[str, Any]:
    """Scores a saved model on a part of a task: that of its ``result.json``, or a given one.

    A model that came without processor, such as a converted one, gets the inputs that the task makes for new models; one whose
    labels have no names gets those of the task.

    Args:
        model_dir: folder of the model, or its id on the Hub.
        part: "train", "validation", "test", or "all" for every row of the data.
        data: as for :func:`train`.
        config: a YAML file whose task to take.
        overrides: changes to it, or to the task of ``result.json``; or all of it: ``["task.name=psmnist"]``.

    Returns:
        task, kind, part, labels (names of classes or of values), and what :func:`lmu_hf.kinds.score` returns.

    Raises:
        InputError: the folder holds no such model, or the data is wrong.
    """
    if part not in (*PARTS, ALL):
        raise InputError(f"part: expected one of {[*PARTS, ALL]}, found {part!r}")
    # A task that is recorded was learned through a processor, which must not be made anew because it got lost.
    recorded = config is None and not overrides and (Path(model_dir) / RESULT_FILE).is_file()
    model, processor = load_model(model_dir, needs_processor=recorded)
    experiment = _experiment(model_dir, config, overrides)
    task = task_of(experiment, data, processor)
    if task.input_size not in (None, model.config.input_size):
        raise InputError(
            f"data: expected {model.config.input_size} features per step, as the model was trained on, found {task.input_size}"
        )
    if not same_labels(names := model.config.label_names, task.label_names):
        raise InputError(f"data: expected the labels {names} that the model was trained on, found {task.label_names}")
    kind = KINDS[task.kind]
    if not isinstance(model, head := class_of(model.config, kind.head)):
        raise InputError(
            f"model: the task {task.name} is one of {kind.name}, which {head.__name__} does, found {_name(model)}"
        )
    scores = score(model, _part(task, part), kind, eval_batch(experiment), task.every)
    return {"task": task.name, "kind": kind.name, "part": part, "labels": task.label_names, **scores}


def _experiment(model_dir: str | Path, config: str | Path | None, overrides: list[str] | None) -> Experiment:
    """The experiment whose task a model is scored on."""
    if config is not None:
        return Experiment.read(config, overrides)
    path = Path(model_dir) / RESULT_FILE
    if not path.is_file():
        if overrides:
            return Experiment.from_dict({}, overrides)
        raise InputError(
            f"model: {model_dir} has no {RESULT_FILE}, which would name the task; name it, for example task.name=psmnist"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["experiment"]
        return Experiment.from_dict(content, overrides)
    except (ValueError, KeyError, TypeError) as error:
        # What was typed is no damage of the file.
        damaged = "" if overrides and isinstance(error, InputError) else f"model: {path} is damaged: "
        raise InputError(f"{damaged}{' '.join(str(error).split())}") from error


def task_of(experiment: Experiment, data: str | None, processor: Any = None) -> TaskData:
    """Loads the task of an experiment; see :func:`lmu_hf.tasks.load_task`."""
    options = {key: value for key, value in experiment.task.items() if key != "name"}
    return load_task(experiment.task["name"], data, processor, **options)


def _part(task: TaskData, part: str) -> torch.utils.data.Dataset:
    if part != ALL:
        return task.parts[part]
    parts = task.parts.values()
    return torch.utils.data.ChainDataset(parts) if task.streams else torch.utils.data.ConcatDataset(parts)


def eval_batch(experiment: Experiment) -> int:
    """Rows at once when scoring."""
    return experiment.training.get("per_device_eval_batch_size", EVAL_BATCH)


def _name(model: Any) -> str:
    return type(model).__name__


def load_model(model_dir: str | Path, needs_processor: bool = True) -> tuple[PreTrainedModel, Any]:
    """Loads a model that a task can be scored with, and its processor, from a folder (or the Hub).

    Args:
        model_dir: the folder, or the id.
        needs_processor: refuse a model without one; with False it is None then.

    Raises:
        InputError: there is no such model there.
    """
    path = Path(model_dir)
    if path.exists() and not (path / "config.json").is_file():
        raise InputError(f"model: {model_dir} holds no config.json; give the folder of a trained model")
    try:
        config = AutoConfig.from_pretrained(str(model_dir))
        loaded: Any = _class(config).from_pretrained(str(model_dir), config=config, output_loading_info=True)
        model, report = loaded
        processor = _processor(model_dir, needs_processor)
    except Exception as error:  # a damaged file can raise anything; each means that there is no usable model
        raise InputError(f"model: {model_dir} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report.get(problem):
            names = ", ".join(str(name) for name in sorted(report[problem])[:3])
            raise InputError(f"model: {model_dir}: weights and config.json do not fit, {problem.replace('_', ' ')} {names}")
    return model.eval(), processor


def _class(config: Any) -> type[PreTrainedModel]:
    found = (getattr(config, "architectures", None) or ["no architecture"])[0]
    for name, head in _HEADS.items():
        if found in (name, (cls := class_of(config, head)).__name__):
            return cls
    raise ValueError(f"expected one of {sorted(_HEADS)}, found {found}")


def _processor(model_dir: str | Path, needed: bool) -> Any:
    try:
        return load_processor(model_dir)
    except OSError:
        if needed:
            raise
        return None


def load_processor(model_dir: str | Path) -> Any:
    """The processor saved beside a model: a tokenizer, or one of our own classes.

    Those are named because AutoProcessor may want torchvision for images.

    Raises:
        OSError: there is none.
    """
    try:
        return LMUImageProcessor.from_pretrained(str(model_dir))
    except ValueError:  # it is one for signals, and says so
        return LMUFeatureExtractor.from_pretrained(str(model_dir))
    except OSError:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(model_dir))
        except (OSError, ValueError, KeyError):
            pass  # the first error names the file that is missing
        raise


def verify_in_fresh_process(model_dir: Path, data: str | None, expected: dict[str, float]) -> dict[str, Any]:
    """Reloads a model in a new Python process and checks that it scores the same on the test part.

    Raises:
        RuntimeError: it does not.
    """
    found = score_in_fresh_process(model_dir, data)
    # The same function on the same machine; threads may add up float32 in another order.
    same = all(abs(found[name] - value) <= _slack(name, value) for name, value in expected.items())
    if not same:
        raise RuntimeError(f"the reloaded model scores differently: expected {expected}, found {found}")
    return {**{name: found[name] for name in expected}, "same": True}


def score_in_fresh_process(model_dir: Path, data: str | None) -> dict[str, Any]:
    """What :func:`evaluate` returns in a new Python process.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "lmu_hf.cli", "evaluate", str(model_dir), "--json"]
    command += [] if data is None else ["--data", data]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=lone_environment())
    if finished.returncode:
        raise RuntimeError(f"the saved model could not be evaluated in a fresh process:\n{finished.stderr[-2000:]}")
    return json.loads(finished.stdout.strip().splitlines()[-1])


def _slack(metric: str, value: float) -> float:
    return 0.0 if metric == "accuracy" else 1e-5 * (1 + value)
