"""What one experiment is: a task, a model, how to train it, a seed. Read from YAML, changed by ``key=value`` overrides."""

from __future__ import annotations

import copy
import difflib
import math
import re
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import InputError

# Set by the run itself; in a file they would contradict the command line.
_RESERVED = (
    "output_dir",
    "seed",
    "data_seed",
    "do_train",
    "do_eval",
    "do_predict",
    "resume_from_checkpoint",
    "hub_token",
    "push_to_hub_token",
    "batch_eval_metrics",
)
_PUBLISHING = ("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision")

# Numbers of TrainingArguments that it does not check itself: whole or not, smallest allowed value.
_NUMBERS = {
    "num_train_epochs": (False, 1e-9),
    "per_device_train_batch_size": (True, 1),
    "per_device_eval_batch_size": (True, 1),
    "gradient_accumulation_steps": (True, 1),
    "learning_rate": (False, 0),
    "weight_decay": (False, 0),
    "warmup_steps": (False, 0),
    "max_grad_norm": (False, 0),
    "label_smoothing_factor": (False, 0),
    "adversarial_radius": (False, 0),
    "adversarial_weight": (False, 1e-9),
    "dataloader_num_workers": (True, 0),
}


@dataclass
class Experiment:
    """One experiment.

    Attributes:
        name: of the experiment; also of its default output folder.
        task: ``{"name": ..., **options}`` of the task.
        model: fields of ``LMUConfig``; input size and labels come from the task. With ``model_type: recurrent`` those of
            ``lmu_hf.baselines.RecurrentConfig``.
        training: fields of ``transformers.TrainingArguments`` and of ``lmu_hf.adversarial.LMUTrainingArguments``.
        seed: of initialisation, data order and dropout.
    """

    name: str
    task: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @classmethod
    def read(cls, path: str | Path, overrides: list[str] | None = None) -> Experiment:
        """Reads a YAML file and applies overrides such as ``model.order=64``.

        Raises:
            InputError: the file is missing, is no YAML, or holds an unknown or reserved key.
        """
        import yaml

        path = Path(path)
        if not path.is_file():
            raise InputError(f"config: no file {path}")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"config: {path} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise InputError(f"config: expected a mapping with the keys {_keys()} in {path}, found {type(content).__name__}")
        return cls.from_dict(content, overrides)

    @classmethod
    def from_dict(cls, content: dict[str, Any], overrides: list[str] | None = None) -> Experiment:
        """Builds an experiment from a mapping, and overrides such as ``model.order=64``, checking every key.

        Raises:
            InputError: a key is unknown, reserved or missing.
        """
        if overrides:
            content = copy.deepcopy(content)
            for override in overrides:
                _apply(content, override)
        _check_keys("config", content, _keys())
        for section in ("task", "model", "training"):
            if not isinstance(content.get(section, {}), dict):
                raise InputError(f"{section}: expected a mapping, found {content[section]!r}")
        if not isinstance(content.get("task", {}).get("name"), str):
            raise InputError("task.name: expected the name of a task, found none")
        experiment = cls(**{"name": content["task"]["name"], **content})
        name, seed = experiment.name, experiment.seed
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
            raise InputError(f"name: expected letters, digits, '-', '_' and '.', found {name!r}; it names a folder")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise InputError(f"seed: expected a whole number within 0..{2**32 - 1}, found {seed!r}")
        experiment._check_sections()
        return experiment

    def _check_sections(self) -> None:
        from .adversarial import LMUTrainingArguments
        from .baselines import CONFIGS
        from .kinds import METRICS

        model_type = self.model.get("model_type", "lmu")
        if model_type not in CONFIGS:
            raise InputError(f"model.model_type: expected one of {list(CONFIGS)}, found {model_type!r}")
        _check_keys("model", self.model, ["model_type", *CONFIGS[model_type].__annotations__])
        known = [f.name for f in fields(LMUTrainingArguments) if f.init]
        _check_keys("training", self.training, known)
        for name in _RESERVED:
            if name in self.training:
                raise InputError(f"training.{name}: set by the run, not by the config; use the command line's option")
        for name in _PUBLISHING:
            if name in self.training:
                raise InputError(f"training.{name}: a run does not publish; use `lmu-hf push MODEL_DIR REPO_ID` after it")
        if self.training.get("dataloader_drop_last"):
            raise InputError(
                "training.dataloader_drop_last: would leave rows of the validation part out as well; leave it out"
            )
        for name, value in self.training.items():
            # YAML reads 1e-3 as a word: its numbers want a dot.
            if isinstance(value, str):
                with suppress(ValueError):
                    self.training[name] = float(value)
        _check_training(self.training)
        if "adversarial_weight" in self.training and not self.training.get("adversarial_radius"):
            raise InputError(
                "training.adversarial_weight: weighs nothing without training.adversarial_radius; set that, or leave it out"
            )
        metric = self.training.get("metric_for_best_model", "loss")
        if str(metric).removeprefix("eval_") not in METRICS:
            raise InputError(f"training.metric_for_best_model: expected one of {list(METRICS)}, found {metric!r}")

    def to_dict(self) -> dict[str, Any]:
        """The experiment as plain data, for the record."""
        return {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self)}


def _check_training(settings: dict[str, Any]) -> None:
    for name, (whole, smallest) in _NUMBERS.items():
        value = settings.get(name, smallest)
        kind = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind) or not smallest <= value < math.inf:
            bound = "> 0" if 0 < smallest < 1 else f">= {smallest}"
            raise InputError(f"training.{name}: expected a {'whole ' if whole else ''}number {bound}, found {value!r}")


def _keys() -> list[str]:
    return [f.name for f in fields(Experiment)]


def _check_keys(section: str, content: dict[str, Any], known: list[str]) -> None:
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {sorted(known)}" if len(known) < 40 else ""
            raise InputError(f"{section}: unknown key {key!r}{hint}")


def _apply(content: dict[str, Any], override: str) -> None:
    import yaml

    path, separator, text = override.partition("=")
    if not separator or not path:
        raise InputError(f"override: expected key=value such as model.order=64, found {override!r}")
    *sections, key = path.split(".")
    for section in sections:
        content = content.setdefault(section, {})
        if not isinstance(content, dict):
            raise InputError(f"override: {section!r} in {override!r} is no section")
    try:
        content[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override: {text!r} is no YAML value in {override!r}") from error
