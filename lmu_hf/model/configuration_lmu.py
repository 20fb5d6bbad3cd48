"""The configuration of an LMU model."""

import difflib
import numbers
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .cells import check_activation
from .layer import LMU

BLOCK_TYPES = ("plain", "residual")
POOLINGS = ("last", "mean", "max")
PREDICTION_LOSSES = ("mse", "huber")
PROBLEM_TYPES = (None, "single_label_classification", "multi_label_classification", "regression")

# Fields that are handed to every LMU layer as they are.
_LAYER_FIELDS = (
    "memory_d",
    "order",
    "hidden_cell",
    "hidden_act",
    "trainable_theta",
    "hidden_to_memory",
    "memory_to_memory",
    "input_to_hidden",
    "discretizer",
    "kernel_initializer",
    "recurrent_initializer",
    "kernel_regularizer",
    "recurrent_regularizer",
    "use_bias",
    "bias_initializer",
    "bias_regularizer",
    "dropout",
    "recurrent_dropout",
    "encoder_act",
    "allow_unstable",
    "go_backwards",
    "bidirectional",
)

# Arguments of LMU that a model has no use for; as unknown keys they would be kept and ignored.
_OF_THE_LAYER = ("return_state", "time_major", "stateful", "algorithm", "device")


@strict
class LMUConfig(PreTrainedConfig):
    """Configuration of :class:`LMUModel` and its heads.

    The defaults are the network of the 2019 paper for permuted sequential MNIST, less its connections.

    Args:
        vocab_size: number of tokens, for models that take ``input_ids``; None for continuous inputs.
        input_size: features per time step of ``input_values``, or width of the token embeddings.
        num_hidden_layers: number of LMU layers.
        block_type: "plain", LMU on LMU as in the papers, or "residual": pre-norm blocks of an LMU and a gated
            feed-forward part, each with a residual connection, for deep nets.
        hidden_size: units of the hidden cell, and the model width of residual blocks. Without meaning in a plain stack
            whose hidden cell is None, "readout" (memory_d outputs) or has a size of its own; see ``output_size``.
        hidden_cell: what each LMU computes from its memory: "rnn", "lstm", "gru", "dense", "readout", a registered name, a
            mapping with a name and options, a list of these (a stack of cells), or None for the memory itself.
        hidden_act: activation of the hidden cell; None for its default.
        memory_d: memory dimensions of each layer.
        order: Legendre polynomials per memory dimension.
        theta: remembered window in time steps: one number, a list with one per memory dimension, or a list of such lists,
            one per layer (``[[50.0], [784.0]]`` gives two layers different windows).
        trainable_theta: train 1 / theta.
        hidden_to_memory: feed the hidden cell's output back into the memory.
        memory_to_memory: feed the memory back into itself through trained weights.
        input_to_hidden: give the layer's input to the hidden cell beside the memory.
        discretizer: "zoh" or "euler".
        kernel_initializer: of the encoders of input and hidden state; None for no kernel.
        recurrent_initializer: of the memory's encoders.
        kernel_regularizer: penalty on the kernel, added to the loss.
        recurrent_regularizer: penalty on the recurrent kernel.
        use_bias: add a bias to the memory's input.
        bias_initializer: of that bias.
        bias_regularizer: penalty on that bias.
        dropout: rate at which a layer's inputs are dropped on their way to the memory, one mask per sequence.
        recurrent_dropout: the same for the memory's feedback.
        encoder_act: activation of the memory's input; None for linear.
        allow_unstable: accept an Euler system that diverges.
        go_backwards: run from the last step to the first.
        bidirectional: run both ways and join the outputs.
        return_sequences: compute the output of every step in LMUModel, or only of the last valid one, which needs "last"
            pooling; a call may say otherwise. Heads ask for what they need; LMUForTimeSeriesPrediction predicts after every step
            or after the last.
        intermediate_size: width of the gated feed-forward part of residual blocks; None for twice ``hidden_size``.
        feed_forward_act: activation of its gate.
        residual_dropout: dropout rate of what a residual block adds.
        layer_norm_epsilon: epsilon of the norms in residual blocks.
        pooling: what a classifier reads: "last", the output of the last valid step, or "mean" or "max" over the valid steps.
        classifier_dropout: dropout rate before the classifier.
        initializer_range: standard deviation of embeddings and linear layers.
        pad_token_id: token of the padding, for token models.
        bos_token_id: token that begins a text, for ``generate``.
        eos_token_id: token or tokens that end one.
        tie_word_embeddings: use the token embeddings as the weights of a language model's head; needs ``input_size`` equal to
            ``output_size``.
        horizon: of a time series model, how many steps ahead its first predicted value lies.
        prediction_length: number of consecutive steps that it predicts.
        target_size: values that it predicts per step; None for ``input_size``.
        prediction_loss: "mse" or "huber".
        huber_delta: error from which on the Huber loss is linear.
        num_labels: number of classes or of regression targets.
        problem_type: "single_label_classification", "multi_label_classification" or "regression"; inferred from the labels
            when None.

    Raises:
        ValueError: a value is wrong; the message names field, value and remedy.
        huggingface_hub.errors.StrictDataclassFieldValidationError: a value is of the wrong type; names field, type and value.
    """

    model_type = "lmu"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int | None = None
    input_size: int = 1
    num_hidden_layers: int = 1
    block_type: str = "plain"
    hidden_size: int | None = 212
    hidden_cell: str | dict | list | None = "rnn"
    hidden_act: str | None = None
    memory_d: int = 1
    order: int = 256
    theta: int | float | list | tuple = 784.0
    trainable_theta: bool = False
    hidden_to_memory: bool = False
    memory_to_memory: bool = False
    input_to_hidden: bool = False
    discretizer: str = "zoh"
    kernel_initializer: str | dict | None = "glorot_uniform"
    recurrent_initializer: str | dict = "orthogonal"
    kernel_regularizer: str | dict | None = None
    recurrent_regularizer: str | dict | None = None
    use_bias: bool = False
    bias_initializer: str | dict = "zeros"
    bias_regularizer: str | dict | None = None
    dropout: int | float = 0.0
    recurrent_dropout: int | float = 0.0
    encoder_act: str | None = None
    allow_unstable: bool = False
    go_backwards: bool = False
    bidirectional: bool = False
    return_sequences: bool = True
    intermediate_size: int | None = None
    feed_forward_act: str = "silu"
    residual_dropout: int | float = 0.0
    layer_norm_epsilon: float = 1e-5
    pooling: str = "last"
    classifier_dropout: int | float = 0.0
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    horizon: int = 1
    prediction_length: int = 1
    target_size: int | None = None
    prediction_loss: str = "mse"
    huber_delta: int | float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        known = [field.name for field in fields(self)]
        for name in kwargs:
            # Extra keys are transformers' custom; a near miss of a field is a slip that would silently train another model.
            if name in _OF_THE_LAYER:
                raise ValueError(f"{name}: an argument of the layer LMU; a model decides it by itself, leave it out")
            if not name.startswith("_") and (near := difflib.get_close_matches(name, known, n=1, cutoff=0.85)):
                raise ValueError(f"{name}: not a field of LMUConfig; did you mean {near[0]!r}?")
        # The plain numbers that JSON knows.
        self.theta = _plain(self.theta)
        super().__post_init__(**kwargs)
        # Here and not only in validate_lmu: what it raises arrives as it is, without the wrapper of @strict.
        self.validate_lmu()

    @property
    def layer_types(self) -> list[str]:
        """The kind of each layer in transformers' terms."""
        return ["linear_attention"] * self.num_hidden_layers

    @property
    def label_names(self) -> list[str]:
        """Name of each class, in the order of the logits."""
        names: Any = self.id2label
        return [names[index] for index in range(len(names))]

    def validate_lmu(self) -> None:
        """Checks every value, and the layers that they describe, by building these without memory."""
        _check_choice("block_type", self.block_type, BLOCK_TYPES)
        _check_choice("pooling", self.pooling, POOLINGS)
        _check_choice("problem_type", self.problem_type, PROBLEM_TYPES)
        _check_choice("prediction_loss", self.prediction_loss, PREDICTION_LOSSES)
        for name in ("num_hidden_layers", "input_size", "horizon", "prediction_length"):
            _check_positive(name, getattr(self, name))
        if not self.id2label or sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(f"id2label: expected a name for each of 0 .. n-1, found {self.id2label!r}; set num_labels >= 1")
        if self.layer_norm_epsilon <= 0:
            raise ValueError(f"layer_norm_epsilon: expected a positive number, found {self.layer_norm_epsilon}")
        if self.vocab_size is not None and self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id: expected a token below vocab_size={self.vocab_size}, found {self.pad_token_id}")
        if self.huber_delta <= 0:
            raise ValueError(f"huber_delta: expected a positive number, found {self.huber_delta}")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "target_size"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        for name in ("classifier_dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a rate in [0, 1), found {getattr(self, name)!r}")
        check_activation("feed_forward_act", self.feed_forward_act)
        if not self.return_sequences and self.pooling != "last":
            raise ValueError(f"return_sequences: False needs pooling='last', found {self.pooling!r}")
        if self.block_type == "residual":
            if self.hidden_size is None:
                raise ValueError("hidden_size: residual blocks need the model width, found None; use for example 64")
            if self.go_backwards:
                raise ValueError(
                    "go_backwards: the output would not line up with the residual connection; use bidirectional=True or "
                    "block_type='plain'"
                )
            if self.bidirectional and self.pooling == "last":
                raise ValueError(
                    "pooling: at the last step the backward direction has seen one input only; use 'mean' or 'max' with "
                    "bidirectional residual blocks"
                )
        _ = self.output_size

    @property
    def first_layer_size(self) -> int:
        """Features per step that the first layer receives."""
        return self.width if self.block_type == "residual" else self.input_size

    @property
    def output_size(self) -> int:
        """Features per step of the model's output: ``hidden_size``, unless the hidden cell or two directions change it."""
        size = self.first_layer_size
        for index in range(self.num_hidden_layers):
            with torch.device("meta"):
                size = self.build_layer(index, size).output_size
            if self.block_type == "residual":
                size = self.width
        return size

    @property
    def width(self) -> int:
        """Model width of residual blocks."""
        assert self.hidden_size is not None
        return self.hidden_size

    def layer_theta(self, index: int) -> Any:
        """theta of one layer.

        Raises:
            ValueError: a list per layer has not one entry per layer.
        """
        if not (isinstance(self.theta, list) and any(isinstance(entry, list) for entry in self.theta)):
            return self.theta
        if len(self.theta) != self.num_hidden_layers or not all(isinstance(entry, list) and entry for entry in self.theta):
            raise ValueError(
                f"theta: a list of lists needs one list for each of the {self.num_hidden_layers} layers, found {self.theta!r}"
            )
        entry = self.theta[index]
        return entry[0] if len(entry) == 1 else entry

    def build_layer(self, index: int, input_size: int) -> LMU:
        """The LMU of layer ``index`` with ``input_size`` input features."""
        takes_size = self.hidden_cell is not None and not self._is_readout
        return LMU(
            input_size,
            theta=self.layer_theta(index),
            hidden_size=self.hidden_size if takes_size else None,
            **{name: getattr(self, name) for name in _LAYER_FIELDS},
        )

    @property
    def _is_readout(self) -> bool:
        # Its size is memory_d, whatever hidden_size says.
        return self.hidden_cell == "readout" or (
            isinstance(self.hidden_cell, dict) and self.hidden_cell.get("name") == "readout"
        )


def _plain(theta: Any) -> Any:
    if isinstance(theta, list | tuple):
        return [_plain(entry) for entry in theta]
    return float(theta) if isinstance(theta, numbers.Real) and not isinstance(theta, bool | int) else theta


def _check_choice(field: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{field}: expected one of {list(choices)}, found {value!r}")


def _check_positive(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field}: expected a whole number >= 1, found {value!r}")


# Names this file in the `auto_map` of what is saved, and copies it there.
LMUConfig.register_for_auto_class()
