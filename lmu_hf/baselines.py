"""LSTM and GRU as baselines: the same heads, the same pooling, the same Trainer, so that a comparison is one more YAML file.

For experiments only. They are no part of what is published: their checkpoints need lmu_hf.

    model:
      model_type: recurrent
      cell: lstm          # or gru, or one per layer: [lmu, lstm]
      hidden_size: 25     # or one per layer
      num_hidden_layers: 4
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .model.configuration_lmu import LMUConfig, _check_choice, _check_positive
from .model.layer import LMU
from .model.modeling_heads import LMUForSequenceClassification
from .model.modeling_lmu import LMUModelOutput, LMUPreTrainedModel
from .model.modeling_series import LMUForTimeSeriesPrediction
from .model.ragged import blank, last_valid

NOT_PUBLISHED = "a baseline, to compare with; baselines are not published, as they load with lmu-hf only"
CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "lmu": LMU}


@strict
class RecurrentConfig(PreTrainedConfig):
    """Configuration of a stack of recurrent layers.

    Args:
        cell: "lstm", "gru" or "lmu"; one for all layers, or a list with one per layer.
        hidden_size: units; one for all layers, or a list with one per layer.
        num_hidden_layers: number of layers; where cell or hidden_size is a list, its length.
        lmu: further arguments of the layers whose cell is "lmu", as of :class:`lmu_hf.LMU`; their hidden cell is "rnn" by
            default.
        input_size: features per time step.
        pooling: as in :class:`LMUConfig`, as are the fields from here on.

    Raises:
        ValueError: a value is wrong; the message names field, value and remedy.
    """

    model_type = "recurrent"

    cell: str | list = "lstm"
    hidden_size: int | list = 100
    num_hidden_layers: int = 1
    lmu: dict | None = None
    input_size: int = 1
    pooling: str = "last"
    classifier_dropout: int | float = 0.0
    initializer_range: float = 0.02
    return_sequences: bool = True
    horizon: int = 1
    prediction_length: int = 1
    target_size: int | None = None
    prediction_loss: str = "mse"
    huber_delta: int | float = 1.0
    # What heads ask of a configuration, and has no meaning here.
    vocab_size: None = None
    bidirectional: bool = False
    go_backwards: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        lengths = {len(value) for value in (self.cell, self.hidden_size) if isinstance(value, list)}
        if len(lengths) > 1 or (lengths - {self.num_hidden_layers} and self.num_hidden_layers != 1):
            raise ValueError(
                f"cell, hidden_size: expected one value, or one for each of num_hidden_layers={self.num_hidden_layers} layers, "
                f"found {self.cell!r} and {self.hidden_size!r}"
            )
        self.num_hidden_layers = max([self.num_hidden_layers, *lengths])
        super().__post_init__(**kwargs)
        for cell in self.cells:
            _check_choice("cell", cell, tuple(CELLS))
        for size in self.sizes:
            _check_positive("hidden_size", size)
        _check_choice("pooling", self.pooling, ("last", "mean"))
        _check_choice("bidirectional", self.bidirectional, (False,))
        _check_choice("go_backwards", self.go_backwards, (False,))
        try:
            with torch.device("meta"):
                self.build_layers()
        except TypeError as error:
            raise ValueError(f"lmu: expected arguments of LMU such as memory_d, order and theta, {error}") from error

    @property
    def cells(self) -> list[str]:
        """The cell of each layer."""
        return self.cell if isinstance(self.cell, list) else [self.cell] * self.num_hidden_layers

    @property
    def sizes(self) -> list[int]:
        """The units of each layer."""
        return self.hidden_size if isinstance(self.hidden_size, list) else [self.hidden_size] * self.num_hidden_layers

    @property
    def output_size(self) -> int:
        """Features per step of the output."""
        return self.sizes[-1]

    @property
    def label_names(self) -> list[str]:
        """Name of each class or target, in the order of the outputs."""
        return LMUConfig.label_names.fget(self)  # type: ignore[attr-defined]

    def build_layers(self) -> nn.ModuleList:
        """The layers, without weights of their own yet."""
        layers, size = nn.ModuleList(), self.input_size
        for cell, units in zip(self.cells, self.sizes, strict=True):
            if cell == "lmu":
                layers.append(LMU(size, hidden_size=units, **{"hidden_cell": "rnn", **(self.lmu or {})}))
            else:
                layers.append(CELLS[cell](size, units, batch_first=True))
            size = units
        return layers


class _Recurrent(LMUPreTrainedModel):
    """What differs from an LMU's model: no code travels along, no regularizers, the weights' first values."""

    config: RecurrentConfig  # type: ignore[assignment]
    supports_gradient_checkpointing = False
    _can_record_outputs = {}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.LSTM | nn.GRU):
            # As in Keras, which the published numbers come from; it carries further over time than torch's own.
            for name, weight in module.named_parameters():
                if name.startswith("weight_ih"):
                    init.xavier_uniform_(weight)
                elif name.startswith("weight_hh"):
                    init.orthogonal_(weight)
                else:
                    init.zeros_(weight)
            if isinstance(module, nn.LSTM):
                bias: Any = module.bias_ih_l0
                first = torch.zeros_like(bias)
                first[module.hidden_size : 2 * module.hidden_size] = 1  # of the gate that forgets: begin by remembering
                init.copy_(bias, first)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        PreTrainedModel.save_pretrained(self, save_directory, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        """Raises ValueError: baselines are not published."""
        raise ValueError(f"this model is {NOT_PUBLISHED}")

    def regularization_loss(self) -> Tensor:
        return torch.zeros((), device=self.device)


class RecurrentModel(_Recurrent):
    """Recurrent layers over signals, without a head."""

    def __init__(self, config: RecurrentConfig):
        super().__init__(config)  # type: ignore[arg-type]
        self.layers = config.build_layers()
        self.post_init()

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, return_sequences: bool = True, **kwargs: Any
    ) -> LMUModelOutput:
        """Runs the layers.

        Args:
            input_values: signals (batch, time, input_size).
            attention_mask: non-zero where a step is valid (batch, time); padding lies behind the end only.
            return_sequences: as in :class:`lmu_hf.LMUModel`; all steps are computed anyway.
            **kwargs: what an LMU would have a use for.

        Raises:
            ValueError: a padded step comes before a valid one.
        """
        x, lengths = input_values, None
        if attention_mask is not None:
            lengths = attention_mask.sum(1)
            if not bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
                raise ValueError("attention_mask: the baselines take padding behind the end only; pad on the right")
            # Steps see those before them only, so what lies behind the end changes nothing but must be a number.
            x = x.masked_fill(attention_mask[..., None] == 0, 0)
        for module in self.layers:
            layer: Any = module
            x = layer(x)[0] if isinstance(layer, nn.LSTM | nn.GRU) else layer.run(x, None, lengths, return_state=False)[0]
            x = blank(x, lengths)
        if self.config.pooling == "last":
            pooled = last_valid(x, lengths)
        else:
            pooled = x.mean(1) if lengths is None else x.sum(1) / lengths.clamp(min=1)[:, None]
        return LMUModelOutput(last_hidden_state=x, pooler_output=pooled)


class RecurrentForSequenceClassification(_Recurrent, LMUForSequenceClassification):
    """The head of :class:`LMUForSequenceClassification` on recurrent layers."""

    def __init__(self, config: RecurrentConfig):
        _Recurrent.__init__(self, config)  # type: ignore[arg-type]
        self.num_labels = len(config.label_names)
        self.model = RecurrentModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.output_size, self.num_labels)
        self.post_init()


class RecurrentForTimeSeriesPrediction(_Recurrent, LMUForTimeSeriesPrediction):
    """The head of :class:`LMUForTimeSeriesPrediction` on recurrent layers."""

    def __init__(self, config: RecurrentConfig):
        _Recurrent.__init__(self, config)  # type: ignore[arg-type]
        self.target_size = config.input_size if config.target_size is None else config.target_size
        self.model = RecurrentModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.output_size, config.prediction_length * self.target_size)
        self.post_init()


CONFIGS: dict[str, type[PreTrainedConfig]] = {"lmu": LMUConfig, "recurrent": RecurrentConfig}
_COUNTERPARTS: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    LMUForSequenceClassification: RecurrentForSequenceClassification,
    LMUForTimeSeriesPrediction: RecurrentForTimeSeriesPrediction,
}


def class_of(config: PreTrainedConfig, head: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class with the given LMU head for a configuration: that itself, or its counterpart on recurrent layers."""
    return _COUNTERPARTS[head] if isinstance(config, RecurrentConfig) else head


AutoConfig.register(RecurrentConfig.model_type, RecurrentConfig, exist_ok=True)
