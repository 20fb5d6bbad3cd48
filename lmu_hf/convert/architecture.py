"""From a Keras model's configuration to the few parts that an LMU model of ours is made of.

Everything that would change a result is either understood or refused by its name; what only matters in training and cannot be
carried over becomes a note.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from .graph import chain, class_name, config_of, refuse
from .source import snake_case

MAX_ORDER = 4096  # its state matrix has 134 MB in float64, and takes minutes to exponentiate

LMU_CLASSES = ("LMU", "LMUFFT", "LMUFeedforward", "LMULayer")
_CELLS = {"SimpleRNN": "rnn", "LSTM": "lstm", "GRU": "gru", "Dense": "dense"}
ACTIVATIONS = {
    **{name: name for name in ("linear", "tanh", "relu", "sigmoid", "gelu", "silu", "elu", "selu", "softplus", "softsign")},
    "swish": "silu",
    "hard_sigmoid": "hard_sigmoid",
}
_POOLINGS = {"GlobalAveragePooling1D": "mean", "GlobalMaxPooling1D": "max"}
_REASONS = {
    "Lambda": "it holds code, which is never run; save the model without it",
    "Bidirectional": "its two directions would have to be told apart; convert each direction's layer by itself",
    "Masking": "keras-lmu drops masks; pass attention_mask to the converted model",
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

    def has(self, option: str) -> bool:
        """Whether a flag is set."""
        return bool(self.options.get(option, False))


@dataclass
class Head:
    """The dense layer at the end."""

    name: str
    units: int
    activation: str
    use_bias: bool = True
    per_step: bool = False
    class_name: str = "Dense"


@dataclass
class Architecture:
    """A chain: LMUs, pooling over time, dropout, head.

    Attributes:
        lmus: in order.
        head: None for a model that ends in an LMU.
        pooling: how the steps become one: "last", "mean", "max"; None if every step is put out.
        head_dropout: dropout before the head.
        input_size: features per step if the file tells.
        loss: name of the training loss if the file tells.
        notes: what was not carried over.
    """

    lmus: list[Lmu]
    head: Head | None = None
    pooling: str | None = "last"
    head_dropout: float = 0.0
    input_size: int | None = None
    loss: str | None = None
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
    keras2 = keras_version is not None and not keras_version.startswith(("3", "4"))
    found = Architecture([], loss=loss, pooling=None)
    layers = chain(model)
    while layers:
        layer = layers.pop(0)
        kind, config = class_name(layer), config_of(layer)
        outer = kind
        what = f"layer {config.get('name', kind)!r} ({kind})"
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
            if isinstance(shape, list) and (len(shape) != 3 or (shape[2] is not None and not isinstance(shape[2], int))):
                raise refuse(what, f"expected inputs (batch, time, features), found {shape}")
            found.input_size = shape[2] if isinstance(shape, list) else None
        elif found.head is not None:
            _after_head(found, kind, config, what, keras2)
        elif kind in ("RNN", *LMU_CLASSES):
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
                found.head_dropout = float(_number(config, "rate", what))
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


def _dense(found: Architecture, layers: list[dict[str, Any]], config: dict[str, Any], what: str, keras2: bool) -> None:
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
        units=_count(config, "units", what),
        activation=_head_activation(config.get("activation"), what),
        use_bias=_flag(config, "use_bias", True),
        per_step=last.return_sequences and found.pooling is None,
    )


def _after_head(found: Architecture, kind: str, config: dict[str, Any], what: str, keras2: bool) -> None:
    assert found.head is not None
    if kind in ("Activation", "Softmax") and found.head.activation == "linear":
        if kind == "Softmax" and config.get("axis", -1) not in (-1, 1, 2):
            raise refuse(what, f"a softmax over axis {config['axis']} has no counterpart")
        found.head.activation = _head_activation("softmax" if kind == "Softmax" else config.get("activation"), what)
    elif kind != "Dropout":
        raise refuse(what, _REASONS.get(kind, "a layer of this class behind the last dense layer has no counterpart"))


def _head_activation(value: Any, what: str) -> str:
    name = _activation_name(value, what)
    if name not in ("linear", "softmax", "sigmoid"):
        raise refuse(what, f"expected a linear, softmax or sigmoid output, found {name!r}")
    return name


def _lmu(layer: dict[str, Any], what: str, found: Architecture, keras2: bool) -> Lmu:
    kind, config = class_name(layer), config_of(layer)
    outer = config
    for option in ("go_backwards", "stateful", "time_major", "return_state", "zero_output_for_mask"):
        if outer.get(option):
            reason = "the converted models take whole sequences, batch first, from the first step to the last"
            raise refuse(what, f"{option}={outer[option]!r}; {reason}")
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
    sequences = _flag(outer, "return_sequences", False)
    if "units" in config or "memory_d" not in config:
        return _first_paper(config, what, found, name, class_name(layer), sequences, keras2)
    order = _count(config, "order", what)
    hidden = config.get("hidden_cell")
    cells: list[Any] = [] if hidden is None else [hidden]
    if hidden is not None and class_name(hidden) == "StackedRNNCells":
        cells = config_of(hidden).get("cells") or []
        if not cells or not isinstance(cells, list):
            raise InputError(f"{what}: expected a list of stacked cells, found {str(cells)[:80]}")
        if config_of(hidden).get("reverse_state_order"):
            raise refuse(what, "reverse_state_order=True; the first cell's state is the one that is fed back")
    names = ("trainable_theta", "hidden_to_memory", "memory_to_memory", "input_to_hidden", "use_bias")
    options: dict[str, Any] = {option: True for option in names if _flag(config, option, False)}
    for option in ("dropout", "recurrent_dropout"):
        if config.get(option):
            options[option] = float(_number(config, option, what))
    for option in ("kernel_regularizer", "recurrent_regularizer", "bias_regularizer"):
        if config.get(option):
            options[option] = _regularizer(config[option], f"{what}: {option}")
    if kind == "LMUFFT" or kind == "LMUFeedforward":
        for option in ("hidden_to_memory", "memory_to_memory", "trainable_theta"):
            options.pop(option, None)
    return Lmu(
        name=name,
        class_name=class_name(layer),
        memory_d=_count(config, "memory_d", what),
        order=_order(order, what),
        theta=float(_number(config, "theta", what)),
        discretizer=_discretizer(config.get("discretizer", "zoh"), what),
        hidden=[_hidden(cell, what, found, keras2) for cell in cells],
        options=options,
        kernel=config.get("kernel_initializer", "glorot_uniform") is not None,
        return_sequences=sequences,
    )


def _first_paper(
    config: dict[str, Any], what: str, found: Architecture, name: str, kind: str, sequences: bool, keras2: bool
) -> Lmu:
    """The cell of Voelker et al. (2019): everything connected, one memory dimension, a plain hidden cell.

    Its class did not always serialize itself; sizes, theta and method then come from the weights.
    """
    theta, units, order = config.get("theta"), config.get("units"), config.get("order")
    realizer = config.get("realizer")
    if isinstance(realizer, dict | str) and "identity" not in str(realizer).lower():
        found.notes.append(f"{what}: realizer {str(realizer)[:60]} is judged by the matrices that it left in the file")
    activation = _activation(config.get("hidden_activation", "tanh"), f"{what}: hidden_activation", keras2)
    if "hidden_activation" not in config:
        found.notes.append(f"{what}: the file does not name hidden_activation; taken as tanh, its default")
    method = config.get("method")
    return Lmu(
        name=name,
        class_name=kind,
        memory_d=1,
        order=None if order is None else _order(_count(config, "order", what), what),
        theta=None if theta is None else float(_number(config, "theta", what)),
        discretizer=None if method is None else _discretizer(method, what),
        hidden=[Hidden("rnn", 0 if units is None else _count(config, "units", what), activation, use_bias=False)],
        options={"hidden_to_memory": True, "memory_to_memory": True, "input_to_hidden": True},
        first_paper=True,
        return_sequences=sequences,
    )


def _hidden(cell: Any, what: str, found: Architecture, keras2: bool) -> Hidden:
    name, config = class_name(cell), config_of(cell)
    kind = _CELLS.get(name.removesuffix("Cell"))
    where = f"hidden cell {config.get('name', name)!r} ({name}) of {what}"
    if kind is None:
        raise refuse(where, f"expected SimpleRNN, LSTM, GRU, Dense or a stack of these, found {name}")
    if kind == "gru" and not _flag(config, "reset_after", False):
        # Keras 2 leaves it out where it is its old default, False.
        raise refuse(
            where, "reset_after=False applies the reset gate before the recurrent product; the GRU here does it after"
        )
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
        units=_count(config, "units", where),
        activation=_activation(activation, f"{where}: activation", keras2),
        recurrent_activation=_activation(gate, f"{where}: recurrent_activation", keras2),
        use_bias=_flag(config, "use_bias", True),
        name=str(config.get("name", "")),
    )


def _activation_name(value: Any, what: str) -> str:
    if isinstance(value, dict):
        # Serialized functions are named, never run: those of Keras itself, no others.
        module, inner = value.get("module"), value.get("config")
        if value.get("class_name") == "function" and module in (None, "builtins", "keras.activations"):
            value = inner
        elif isinstance(value.get("class_name"), str) and module in (None, "keras.layers", "keras.activations"):
            value = (
                snake_case(value["class_name"]) if not inner or set(inner) <= {"name", "dtype", "trainable"} else str(inner)
            )
    if value is None:
        return "linear"
    if not isinstance(value, str):
        raise refuse(what, f"expected the name of an activation of Keras, found {str(value)[:80]}")
    return value


def _activation(value: Any, what: str, keras2: bool) -> str:
    name = _activation_name(value, what)
    if name == "hard_sigmoid" and keras2:
        raise refuse(what, "hard_sigmoid of Keras 2 is clip(0.2 x + 0.5), of Keras 3 and PyTorch clip(x / 6 + 0.5)")
    if name not in ACTIVATIONS:
        raise refuse(what, f"expected one of {sorted(ACTIVATIONS)}, found {name!r}")
    return ACTIVATIONS[name]


def _regularizer(value: Any, what: str) -> dict[str, Any]:
    name = class_name(value).lower() if isinstance(value, dict) else str(value).lower()
    factors = config_of(value) if isinstance(value, dict) else {}
    used = {key: float(factors[key]) for key in ("l1", "l2") if factors.get(key)}
    if name not in ("l1", "l2", "l1l2", "l1_l2"):
        raise refuse(what, f"expected L1, L2 or L1L2, found {name!r}")
    return {"name": "l1_l2" if name in ("l1l2", "l1_l2") else name, **used}


def _discretizer(value: Any, what: str) -> str:
    if value not in ("zoh", "euler"):
        raise refuse(what, f"expected discretizer zoh or euler, found {value!r}")
    return value


def _order(order: int, what: str) -> int:
    if order > MAX_ORDER:
        raise refuse(what, f"expected order <= {MAX_ORDER}, found {order:,}")
    return order


def _count(config: dict[str, Any], key: str, what: str) -> int:
    value = config.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 24:
        raise InputError(f"{what}: {key}: expected a whole number from 1 to {1 << 24:,}, found {value!r}")
    return value


def _number(config: dict[str, Any], key: str, what: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise InputError(f"{what}: {key}: expected a number, found {value!r}")
    return value


def _flag(config: dict[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise InputError(f"model_config: {key}: expected true or false, found {value!r}")
    return value
