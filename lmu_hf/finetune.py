"""Training that begins with the weights of a checkpoint: what is taken over, what is made anew, what may differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .errors import InputError
from .evaluation import load_processor
from .experiment import Experiment
from .kinds import KINDS, same_labels
from .model.configuration_lmu import LMUConfig
from .model.modeling_lmu import LMUModel
from .tasks import TaskData

# Fields that say how to train, not what the weights mean.
_OF_THE_RUN = (
    "dropout",
    "recurrent_dropout",
    "residual_dropout",
    "classifier_dropout",
    "kernel_regularizer",
    "recurrent_regularizer",
    "bias_regularizer",
    "trainable_theta",
    "initializer_range",
)


class Base:
    """A checkpoint to begin with.

    Args:
        source: folder of a model, or its id on the Hub.

    Attributes:
        config: of the checkpoint.
        processor: saved beside it; None if there is none.
        record: for ``result.json``: ``base_model`` (an id on the Hub, or None) and ``fine_tuned_from``.

    Raises:
        InputError: there is no LMU.
    """

    def __init__(self, source: str):
        if not source.strip():
            raise InputError("model: expected a folder or an id on the Hub, found an empty text")
        path = Path(source)
        if path.exists() and not (path / "config.json").is_file():
            raise InputError(f"model: {source} holds no config.json; give the folder of a trained model")
        self.source = source
        try:
            config = LMUConfig.get_config_dict(source)[0]
            if config.get("model_type") != LMUConfig.model_type:
                raise ValueError(f"expected an LMU, found a model of the type {config.get('model_type')!r}")
            self.config: LMUConfig = LMUConfig.from_pretrained(source)
        except Exception as error:  # a damaged file can raise anything; each means that there is no usable model
            raise InputError(f"model: {source} could not be loaded: {' '.join(str(error).split())[:300]}") from error
        try:
            self.processor = load_processor(source)
        except (OSError, ValueError):
            self.processor = None
        local = path.exists()
        # A local folder is nobody else's: its name says what it is, its path where this was run.
        self.record: dict[str, Any] = {
            "base_model": None if local else source,
            "fine_tuned_from": {"name": path.resolve().name if local else source, "on_hub": not local},
        }

    def build(self, experiment: Experiment, task: TaskData) -> PreTrainedModel:
        """The checkpoint's model with the task's head. The head is taken over if it has the same labels, made anew otherwise.

        Raises:
            InputError: the experiment asks for another architecture, the data does not fit, or weights are missing.
        """
        kind = KINDS[task.kind]
        config = self._config(experiment, task, kind)
        try:
            model = kind.head(config)
            loaded: Any = LMUModel.from_pretrained(self.source, output_loading_info=True)
            backbone, report = loaded
        except Exception as error:
            raise InputError(f"model: {self.source} could not be loaded: {' '.join(str(error).split())[:300]}") from error
        if report["missing_keys"] or report["mismatched_keys"]:
            name = sorted(map(str, report["missing_keys"] or report["mismatched_keys"]))[0]
            raise InputError(f"model: {self.source}: weights and config.json do not fit, see {name}")
        whole: Any = model
        whole.model.load_state_dict(backbone.state_dict())
        same = (
            (self.config.architectures or [""])[0] == kind.head.__name__
            and same_labels(self.config.label_names, config.label_names)
            and self.config.problem_type in (None, config.problem_type)  # None leaves it to the labels
            and self._answers(self.config) == self._answers(config)
        )
        if same:
            whole.load_state_dict(kind.head.from_pretrained(self.source).state_dict())
        self.record["fine_tuned_from"]["head"] = "taken over" if same else "new"
        return model

    @staticmethod
    def _answers(config: LMUConfig) -> tuple[Any, ...]:
        return config.target_size, config.horizon, config.prediction_length

    def _config(self, experiment: Experiment, task: TaskData, kind: Any) -> LMUConfig:
        if task.input_size not in (None, self.config.input_size):
            raise InputError(
                f"data: expected {self.config.input_size} features per step, as the model {self.source} was trained on, found "
                f"{task.input_size}"
            )
        decided = kind.fields(task)
        changes = dict(decided)
        for name, value in experiment.model.items():
            if name in _OF_THE_RUN:
                changes[name] = value
            elif name in decided:
                raise InputError(f"model.{name}: the task {task.name} decides it; leave it out")
            elif _plain(getattr(self.config, name, None)) != _plain(value):
                raise InputError(
                    f"model.{name}: the model {self.source} has {getattr(self.config, name, None)!r}, found {value!r}; "
                    "fine-tuning keeps the architecture: leave it out"
                )
        for name in ("vocab_size", "pad_token_id"):
            if name in decided and decided[name] != getattr(self.config, name):
                raise InputError(
                    f"model: {self.source} has {name} {getattr(self.config, name)}, its tokenizer {decided[name]}; fine-tune "
                    "with the tokenizer that it was trained with"
                )
        if "vocab_size" not in decided and self.config.vocab_size is not None:
            raise InputError(f"model: {self.source} reads tokens, the task {task.name} gives signals")
        fields = self.config.to_dict()
        for name in ("architectures", "auto_map", "transformers_version", "model_type", "num_labels"):
            fields.pop(name, None)
        try:
            return LMUConfig(**{**fields, **changes})
        except Exception as error:  # ValueError, or one of huggingface_hub's for a wrong type
            raise InputError(f"model.{' '.join(str(error).split())}") from error


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
