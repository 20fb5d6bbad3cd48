"""From a Keras model's configuration to the few parts that an LMU model of ours is made of.

Everything that would change a result is either understood or refused by its name; what only matters in training and cannot be
carried over becomes a note.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from .graph import MODEL_CLASSES, chain, class_name, config_of, refuse
from .values import (
    activation_name,
    read_activation,
    read_count,
    read_discretizer,
    read_flag,
    read_number,
    read_order,
    read_regularizer,
)

LMU_CLASSES = ("LMU", "LMUFFT", "LMUFeedforward", "LMULayer")
# By our names of their kinds.
CELL_CLASSES = {"rnn": "SimpleRNNCell", "lstm": "LSTMCell", "gru": "GRUCell", "dense": "Dense"}
# What keras-lmu and LMUConfig call alike.
FLAGS = ("trainable_theta", "hidden_to_memory", "memory_to_memory", "input_to_hidden", "use_bias")
REGULARIZERS = ("kernel_regularizer", "recurrent_regularizer", "bias_regularizer")
_CELLS = {"SimpleRNN": "rnn", "LSTM": "lstm", "GRU": "gru", "Dense": "dense"}
_POOLINGS = {"GlobalAveragePooling1D": "mean", "GlobalMaxPooling1D": "max"}
_REASONS = {
    "Lambda": "it holds code, which is never run; save the model without it",
    "Bidirectional": "it is understood around an LMU only",
    "Masking": "leave it out and pass attention_mask to the converted model",
    "LMUCellODE": "its memory is trained or integrated otherwise",
    "LMUCellGating": "its gates have no counterpart",
}


@dataclass
class Hidden:
    """One hidden cell: our name of its kind, sizes and activations.

    ``name`` is the one in the file, ``layer`` that of the layer that it was there, for a dense layer behind the LMU.
    """

    kind: str
    units: int
    activation: str
    recurrent_activation: str = "sigmoid"
    use_bias: bool = True
    reset_after: bool = True
    name: str = ""
    layer: str | None = None


@dataclass
class Lmu:
    """One LMU layer. ``theta`` and ``discretizer`` are None where the file does not say and its A and B have to."""

    name: str
    class_name: str
    memory_d: int
    order: int | None
    theta: float | None
    discretizer: str | None
    hidden: list[Hidden]
    options: dict[str, Any] = field(default_factory=dict)
    kernel: bool = True
    first_paper: bool = False
    return_sequences: bool = False
    bidirectional: bool = False
    go_backwards: bool = False

    def has(self, option: str) -> bool:
        """Whether a flag is set."""
        return bool(self.options.get(option, False))


@dataclass
class Head:
    """The dense layer at the end. ``use_bias`` is None where the weights have to tell."""

    name: str
    units: int
    activation: str
    use_bias: bool | None = True
    per_step: bool = False
    class_name: str = "Dense"


@dataclass
class Embedding:
    """The table of tokens at the beginning."""

    name: str
    tokens: int
    size: int


@dataclass
class Architecture:
    """A chain: LMUs, pooling over time, dropout, head.

    Attributes:
        lmus: in order.
        head: None for a model that ends in an LMU.
        pooling: how the steps become one: "last", "mean", "max"; None if every step is put out.
        head_dropout: dropout before the head.
        input_size: features per step if the file tells.
        embedding: for a model of tokens.
        loss: name of the training loss if the file tells.
        nested: names of the models inside of the model.
        notes: what was not carried over.
    """

    lmus: list[Lmu]
    head: Head | None = None
    pooling: str | None = "last"
    head_dropout: float = 0.0
    input_size: int | None = None
    embedding: Embedding | None = None
    loss: str | None = None
    nested: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parse(model: dict[str, Any], loss: str | None = None, keras_version: str | None = None) -> Architecture:
    """Understands a model's configuration.

    Args:
        model: as Keras serializes it, ``{"class_name": ..., "config": ...}``.
        loss: name of the training loss.
        keras_version: "2.2.4" or the like; some activations changed their meaning with it.

    Raises:
        InputError: a part of it cannot be converted; names the part and the reason.
    """
    keras2 = None if keras_version is None else not keras_version.startswith(("3", "4"))
    found = Architecture([], loss=loss, pooling=None)
    layers = chain(model)
    while layers:
        layer = layers.pop(0)
        if class_name(layer) in MODEL_CLASSES:
            # A model inside of the model; its input is what comes before it.
            inside = [
                part for part in chain(layer) if class_name(part) != "InputLayer" or not (found.lmus or found.embedding)
            ]
            layers[:0] = inside
            found.nested.append(str(config_of(layer).get("name", "")))
            continue
        kind, config = class_name(layer), config_of(layer)
        outer = kind
        what = f"layer {config.get('name', kind)!r} ({kind})"
        if "mixed" in str(config.get("dtype")) and "mixed" not in str(found.notes):
            found.notes.append(
                "the original computed with the policy of mixed precision in its configuration, this in float32"
            )
        if config.get("trainable") is False:
            found.notes.append(f"{what} was frozen in the original and can be trained here")
        if kind == "TimeDistributed":
            inner = config.get("layer") or {}
            if class_name(inner) != "Dense":
                raise refuse(what, "TimeDistributed is understood around Dense only")
            # Dense acts on each step by itself anyway.
            kind, config = "Dense", {**config_of(inner), "name": config.get("name")}
        if kind == "InputLayer":
            shape = config.get("batch_shape") or config.get("batch_input_shape")
            if isinstance(shape, list) and len(shape) == 2 and layers and class_name(layers[0]) == "Embedding":
                continue
            if isinstance(shape, list) and (len(shape) != 3 or (shape[2] is not None and not isinstance(shape[2], int))):
                raise refuse(what, f"expected inputs (batch, time, features), found {shape}")
            found.input_size = shape[2] if isinstance(shape, list) else None
        elif kind == "Embedding" and not found.lmus and found.embedding is None:
            if config.get("mask_zero"):
                raise refuse(
                    what, "mask_zero=True masks token 0; leave it out and pass attention_mask to the converted model"
                )
            found.input_size = read_count(config, "output_dim", what)
            name = str(config.get("name", ""))
            found.embedding = Embedding(name, read_count(config, "input_dim", what), found.input_size)
        elif found.head is not None:
            _after_head(found, kind, config, what, keras2)
        elif kind in ("RNN", *LMU_CLASSES) or (kind == "Bidirectional" and _inner_class(config) in ("RNN", *LMU_CLASSES)):
            if found.lmus and not found.lmus[-1].return_sequences:
                raise refuse(what, "it follows a layer without return_sequences")
            if found.pooling is not None:
                raise refuse(what, "an LMU behind a pooling layer has no counterpart")
            found.lmus.append(_lmu(layer, what, found, keras2))
            batch_shape = config.get("batch_input_shape")
            if found.input_size is None and len(found.lmus) == 1 and isinstance(batch_shape, list) and len(batch_shape) == 3:
                found.input_size = batch_shape[2]
        elif kind in ("Dropout", "SpatialDropout1D"):
            if layers and class_name(layers[0]) in ("Dense", "TimeDistributed") and kind == "Dropout":
                found.head_dropout = float(read_number(config, "rate", what))
            elif config.get("rate"):
                found.notes.append(f"{what}: rate {config['rate']} acts in training only and is not carried over")
        elif not found.lmus:
            raise refuse(what, _REASONS.get(kind, "what comes before the first LMU has to be done to the inputs"))
        elif kind in _POOLINGS:
            if not found.lmus[-1].return_sequences or found.pooling is not None:
                raise refuse(what, "there are no steps to pool")
            if config.get("keepdims"):
                raise refuse(what, "keepdims=True has no counterpart")
            found.pooling = _POOLINGS[kind]
        elif kind == "Dense":
            _dense(found, layers, config, what, keras2)
            if found.head is not None:
                found.head.class_name = outer
        else:
            raise refuse(what, _REASONS.get(kind, "a layer of this class has no counterpart"))
    if not found.lmus:
        raise InputError("model_config: expected at least one LMU layer, found none")
    if found.pooling is None and not found.lmus[-1].return_sequences:
        found.pooling = "last"
    return found


def _dense(
    found: Architecture, layers: list[dict[str, Any]], config: dict[str, Any], what: str, keras2: bool | None
) -> None:
    last = found.lmus[-1]
    if layers and class_name(layers[0]) in ("Dense", "TimeDistributed"):
        if (
            last.hidden
            or found.head_dropout
            or found.pooling is not None
            or len(found.lmus) > 1
            or last.has("input_to_hidden")
        ):
            raise refuse(
                what, "a classifier has one dense layer here; only behind an LMU without a hidden cell can another be"
            )
        # A dense layer on the memory is a dense hidden cell.
        cell = _hidden({"class_name": "Dense", "config": config}, what, found, keras2)
        cell.layer = cell.name
        last.hidden.append(cell)
        return
    found.head = Head(
        name=str(config.get("name", "")),
        units=read_count(config, "units", what),
        activation=_head_activation(config.get("activation"), what),
        use_bias=read_flag(config, "use_bias", True),
        per_step=last.return_sequences and found.pooling is None,
    )


def _inner_class(config: dict[str, Any]) -> str:
    return class_name(config.get("layer") or {"class_name": ""})


def _after_head(found: Architecture, kind: str, config: dict[str, Any], what: str, keras2: bool | None) -> None:
    assert found.head is not None
    if kind in ("Activation", "Softmax") and found.head.activation == "linear":
        if kind == "Softmax" and config.get("axis", -1) not in (-1, 1, 2):
            raise refuse(what, f"a softmax over axis {config['axis']} has no counterpart")
        found.head.activation = _head_activation("softmax" if kind == "Softmax" else config.get("activation"), what)
    elif kind != "Dropout":
        raise refuse(what, _REASONS.get(kind, "a layer of this class behind the last dense layer has no counterpart"))


def _head_activation(value: Any, what: str) -> str:
    name = activation_name(value, what)
    if name not in ("linear", "softmax", "sigmoid"):
        raise refuse(what, f"expected a linear, softmax or sigmoid output, found {name!r}")
    return name


def _lmu(layer: dict[str, Any], what: str, found: Architecture, keras2: bool | None) -> Lmu:
    kind, config = class_name(layer), config_of(layer)
    if kind == "Bidirectional":
        mirrored = config.get("backward_layer")  # Keras 3 always writes it
        if config.get("merge_mode", "concat") != "concat":
            raise refuse(what, f"expected merge_mode='concat', found {config['merge_mode']!r}")
        if mirrored is not None and _anonymous(mirrored) != _anonymous(config["layer"]):
            raise refuse(what, "its backward layer has other settings than its forward layer")
        both = _lmu(config["layer"], what, found, keras2)
        both.name, both.class_name, both.bidirectional = str(config.get("name", "")), kind, True
        if both.go_backwards:
            raise refuse(what, "go_backwards inside of it")
        return both
    outer = config
    for option in ("stateful", "time_major", "return_state"):
        if outer.get(option):
            reason = "the converted models take whole sequences, batch first, each by itself, and put out one tensor"
            raise refuse(what, f"{option}={outer[option]!r}; {reason}")
    if outer.get("go_backwards") and outer.get("return_sequences"):
        raise refuse(what, "go_backwards=True with return_sequences=True, whose steps come out in reversed order")
    if kind == "RNN":
        cell = config.get("cell")
        if isinstance(cell, list) or (isinstance(cell, dict) and class_name(cell) == "StackedRNNCells"):
            raise refuse(what, "LMU cells stacked in one RNN; give each an RNN layer of its own")
        inner = class_name(cell or {})
        if inner != "LMUCell":
            raise refuse(f"{what} with cell {inner}", _REASONS.get(inner, "expected an LMUCell"))
        assert isinstance(cell, dict)
        kind, config = inner, config_of(cell)
    name = str(outer.get("name", ""))
    sequences = read_flag(outer, "return_sequences", False)
    backwards = read_flag(outer, "go_backwards", False)
    if "units" in config or "memory_d" not in config:
        old = _first_paper(config, what, found, name, class_name(layer), sequences, keras2)
        old.go_backwards = backwards
        return old
    order = read_count(config, "order", what)
    hidden = config.get("hidden_cell")
    cells: list[Any] = [] if hidden is None else [hidden]
    if hidden is not None and class_name(hidden) == "StackedRNNCells":
        cells = config_of(hidden).get("cells") or []
        if not cells or not isinstance(cells, list):
            raise InputError(f"{what}: expected a list of stacked cells, found {str(cells)[:80]}")
        if config_of(hidden).get("reverse_state_order"):
            raise refuse(what, "reverse_state_order=True; the first cell's state is the one that is fed back")
    options: dict[str, Any] = {option: True for option in FLAGS if read_flag(config, option, False)}
    for option in ("dropout", "recurrent_dropout"):
        if config.get(option):
            options[option] = float(read_number(config, option, what))
    for option in REGULARIZERS:
        if config.get(option):
            options[option] = read_regularizer(config[option], f"{what}: {option}")
    if kind == "LMUFFT" or kind == "LMUFeedforward":
        for option in ("hidden_to_memory", "memory_to_memory", "trainable_theta"):
            options.pop(option, None)
    return Lmu(
        name=name,
        class_name=class_name(layer),
        memory_d=read_count(config, "memory_d", what),
        order=read_order(order, what),
        theta=float(read_number(config, "theta", what)),
        discretizer=read_discretizer(config.get("discretizer", "zoh"), what),
        hidden=[_hidden(cell, what, found, keras2) for cell in cells],
        options=options,
        kernel=config.get("kernel_initializer", "glorot_uniform") is not None,
        return_sequences=sequences,
        go_backwards=backwards,
    )


def _anonymous(layer: Any) -> Any:
    """A serialized layer without what two directions differ in."""
    if isinstance(layer, dict):
        own = ("name", "go_backwards", "build_config", "shared_object_id", "seed")
        return {key: _anonymous(value) for key, value in layer.items() if key not in own}
    return [_anonymous(value) for value in layer] if isinstance(layer, list) else layer


def _first_paper(
    config: dict[str, Any], what: str, found: Architecture, name: str, kind: str, sequences: bool, keras2: bool | None
) -> Lmu:
    """The cell of Voelker et al. (2019): everything connected, one memory dimension, a plain hidden cell.

    Its class did not always serialize itself; sizes, theta and method then come from the weights.
    """
    theta, units, order = config.get("theta"), config.get("units"), config.get("order")
    realizer = config.get("realizer")
    if isinstance(realizer, dict | str) and "identity" not in str(realizer).lower():
        found.notes.append(f"{what}: realizer {str(realizer)[:60]} is judged by the matrices that it left in the file")
    activation = read_activation(config.get("hidden_activation", "tanh"), f"{what}: hidden_activation", keras2)
    if "hidden_activation" not in config:
        found.notes.append(f"{what}: the file does not name hidden_activation; taken as tanh, its default")
    method = config.get("method")
    return Lmu(
        name=name,
        class_name=kind,
        memory_d=1,
        order=None if order is None else read_order(read_count(config, "order", what), what),
        theta=None if theta is None else float(read_number(config, "theta", what)),
        discretizer=None if method is None else read_discretizer(method, what),
        hidden=[Hidden("rnn", 0 if units is None else read_count(config, "units", what), activation, use_bias=False)],
        options={"hidden_to_memory": True, "memory_to_memory": True, "input_to_hidden": True},
        first_paper=True,
        return_sequences=sequences,
    )


def _hidden(cell: Any, what: str, found: Architecture, keras2: bool | None) -> Hidden:
    name, config = class_name(cell), config_of(cell)
    kind = _CELLS.get(name.removesuffix("Cell"))
    where = f"hidden cell {config.get('name', name)!r} ({name}) of {what}"
    if kind is None:
        raise refuse(where, f"expected SimpleRNN, LSTM, GRU, Dense or a stack of these, found {name}")
    for option in ("dropout", "recurrent_dropout"):
        if config.get(option):
            found.notes.append(f"{where}: {option}={config[option]} acts in training only and is not carried over")
    for option, value in config.items():
        if option.endswith(("_regularizer", "_constraint")) and value is not None:
            found.notes.append(f"{where}: {option} acts in training only and is not carried over")
    activation = config.get("activation", "linear" if kind == "dense" else "tanh")
    default = "hard_sigmoid" if keras2 else "sigmoid"
    gate = config.get("recurrent_activation", default) if kind in ("lstm", "gru") else "sigmoid"
    return Hidden(
        kind=kind,
        units=read_count(config, "units", where),
        activation=read_activation(activation, f"{where}: activation", keras2),
        recurrent_activation=read_activation(gate, f"{where}: recurrent_activation", keras2),
        use_bias=read_flag(config, "use_bias", True),
        # Keras before 2.1.3 had no other.
        reset_after=kind != "gru" or read_flag(config, "reset_after", False),
        name=str(config.get("name", "")),
    )
