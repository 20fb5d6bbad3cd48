"""From an architecture and its weights to a model of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import lmu_hf

from ..errors import InputError
from ..model.configuration_lmu import LMUConfig
from ..model.legendre import smallest_stable_theta
from ..model.modeling_lmu import LMUModel, LMUPreTrainedModel
from .architecture import FLAGS, REGULARIZERS, Architecture, Head, Hidden, Lmu
from .graph import refuse
from .weights import Arrays, LmuWeights, Weights

# Training losses of Keras and the kind of problem that they belong to.
_PROBLEMS = {
    "sparse_categorical_crossentropy": "single_label_classification",
    "categorical_crossentropy": "single_label_classification",
    "binary_crossentropy": "multi_label_classification",
    "mse": "regression",
    "mae": "regression",
    "mean_squared_error": "regression",
    "mean_absolute_error": "regression",
}
# What a Keras model applies to its logits, by the kind of problem; nothing where it is not listed.
ACTIVATION_OF = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid"}
_OF_ACTIVATION = {activation: problem for problem, activation in ACTIVATION_OF.items()}
_PER_STEP = {"linear": "LMUForTimeSeriesPrediction", "softmax": "LMUForTokenClassification"}
_DEFAULT_ACTIVATION = {"rnn": "tanh", "lstm": "tanh", "gru": "tanh", "dense": "linear"}


def build_model(architecture: Architecture, weights: Weights) -> LMUPreTrainedModel:
    """Builds the model.

    Raises:
        InputError: the model has parts that no model here combines.
    """
    head = architecture.head
    target = _target(architecture)
    config = LMUConfig(**_config(architecture, weights))
    arrays = [array for lmu in weights.lmus for group in (lmu.own, *lmu.hidden) for array in group.values()]
    dtype = torch.float64 if any(array.dtype == np.float64 for array in [*arrays, *weights.head.values()]) else torch.float32
    config.dtype = dtype
    with torch.random.fork_rng(devices=[]):
        model = target(config)
    model.to(dtype)  # type: ignore[arg-type]  # transformers wraps it in a way that hides its signature
    if not arrays and head is None:
        raise refuse("the model", "it has no weights at all, neither kernel nor hidden cell nor dense layer")
    prefix = "model." if head is not None else ""
    state: Arrays = {}
    for index, (lmu, values) in enumerate(zip(architecture.lmus, weights.lmus, strict=True)):
        place = f"{prefix}layers.{index}.lmu"
        state |= {f"{place}.cell.{name}": array for name, array in layer_state(lmu, values).items()}
        if values.backward is not None:
            state |= {f"{place}.backward_cell.{name}": array for name, array in layer_state(lmu, values.backward).items()}
    if weights.embedding is not None:
        state[f"{prefix}embed_tokens.weight"] = weights.embedding
    if head is not None:
        state["score.weight"] = weights.head["kernel"].T
        # A bias of zero is what a layer without one computes with.
        state["score.bias"] = weights.head.get("bias", np.zeros(head.units))
        if not head.use_bias:
            architecture.notes.append("the classifier has a bias here, zero now, that can be trained")
    tensors = {name: torch.from_numpy(np.array(array, order="C")).to(dtype) for name, array in state.items()}
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def _target(architecture: Architecture) -> type[LMUPreTrainedModel]:
    """The class whose forward computes what the original computes."""
    head = architecture.head
    if head is None:
        if architecture.pooling not in (None, "last"):
            raise refuse("the model", "pooling over time without a dense layer behind it has no counterpart")
        return LMUModel
    if not head.per_step:
        return lmu_hf.LMUForSequenceClassification
    target = getattr(lmu_hf, _PER_STEP.get(head.activation, ""), None)
    if target is None:
        raise refuse(f"layer {head.name!r}", f"a dense layer with {head.activation} output on every step has no counterpart")
    return target


def problem_type(head: Head, loss: str | None) -> str | None:
    """What the head is for; by its activation, else by the loss, else by its size. None leaves it to the labels."""
    if head.activation in _OF_ACTIVATION:
        return _OF_ACTIVATION[head.activation]
    return _PROBLEMS.get(loss or "", "regression" if head.units == 1 else None)


def _config(architecture: Architecture, weights: Weights) -> dict[str, Any]:
    first, *others = architecture.lmus
    settings = [_layer_settings(lmu) for lmu in architecture.lmus]
    defaults = vars(LMUConfig())
    for lmu, other in zip(others, settings[1:], strict=True):
        pairs = {key: [one.get(key, defaults.get(key)) for one in (settings[0], other)] for key in {**settings[0], **other}}
        differing = [f"{key} {a!r} and {b!r}" for key, (a, b) in pairs.items() if a != b]
        if differing:
            found = ", ".join(differing[:3])
            raise refuse(f"layer {lmu.name!r}", f"all LMUs of a model share their settings, apart from theta; found {found}")
    thetas = [float(lmu.theta or 0) for lmu in architecture.lmus]
    for lmu, values in zip(architecture.lmus, weights.lmus, strict=True):
        _check_stability(lmu, values, architecture, settings[0])
    config = {
        **settings[0],
        "input_size": weights.input_size,
        "vocab_size": architecture.embedding.tokens if architecture.embedding is not None else None,
        "num_hidden_layers": len(architecture.lmus),
        "theta": thetas[0] if len(set(thetas)) == 1 else [[theta] for theta in thetas],
        "hidden_size": None,
        "return_sequences": architecture.pooling != "last",
    }
    if len(first.hidden) == 1:
        config["hidden_size"] = first.hidden[0].units
    head = architecture.head
    if head is not None and head.per_step and head.activation == "linear":
        config |= {"target_size": head.units, "classifier_dropout": architecture.head_dropout}
    elif head is not None:
        config |= {
            "return_sequences": True,
            "pooling": architecture.pooling or "last",
            "num_labels": head.units,
            "problem_type": problem_type(head, architecture.loss),
            "classifier_dropout": architecture.head_dropout,
        }
    return config


def _layer_settings(lmu: Lmu) -> dict[str, Any]:
    """The fields of LMUConfig that describe one layer, in their shortest form."""
    settings: dict[str, Any] = {
        "memory_d": lmu.memory_d,
        "order": lmu.order,
        "discretizer": lmu.discretizer,
        "hidden_cell": None,
        "kernel_initializer": "glorot_uniform" if lmu.kernel else None,
        "bidirectional": lmu.bidirectional,
        "go_backwards": lmu.go_backwards,
        **lmu.options,
    }
    if len(lmu.hidden) == 1:
        cell = hidden_spec(lmu.hidden[0])
        del cell["hidden_size"]
        activation = cell.pop("activation", None)
        settings |= {"hidden_cell": cell["name"] if len(cell) == 1 else cell, "hidden_act": activation}
    elif lmu.hidden:
        settings["hidden_cell"] = [hidden_spec(cell) for cell in lmu.hidden]
    return settings


def hidden_spec(cell: Hidden) -> dict[str, Any]:
    """A hidden cell as LMUConfig has it."""
    spec: dict[str, Any] = {"name": cell.kind, "hidden_size": cell.units}
    if cell.activation != _DEFAULT_ACTIVATION[cell.kind]:
        spec["activation"] = cell.activation
    if cell.kind in ("lstm", "gru") and cell.recurrent_activation != "sigmoid":
        spec["recurrent_activation"] = cell.recurrent_activation
    if not cell.use_bias:
        spec["use_bias"] = False
    if not cell.reset_after:
        spec["reset_after"] = False
    return spec


def _check_stability(lmu: Lmu, values: LmuWeights, architecture: Architecture, settings: dict[str, Any]) -> None:
    if lmu.discretizer != "euler":
        return
    assert lmu.order is not None
    theta = min(float(lmu.theta or 0), 1 / float(values.own["theta_inv"]) if "theta_inv" in values.own else np.inf)
    if theta < smallest_stable_theta(lmu.order):
        settings["allow_unstable"] = True
        architecture.notes.append(f"layer {lmu.name!r}: under Euler this memory diverges, as it did in the original")


def layer_state(lmu: Lmu, weights: LmuWeights) -> Arrays:
    """The weights of one LMU by the names of :class:`LMUCell`."""
    state = dict(weights.own)
    for index, (cell, values) in enumerate(zip(lmu.hidden, weights.hidden, strict=True)):
        prefix = "hidden_cell." if len(lmu.hidden) == 1 else f"hidden_cell.cells.{index}."
        state[f"{prefix}weight_ih"] = _swap_gates(cell.kind, values["kernel"]).T
        if "recurrent_kernel" in values:
            state[f"{prefix}weight_hh"] = _swap_gates(cell.kind, values["recurrent_kernel"]).T
        if "bias" in values:
            bias = _swap_gates(cell.kind, values["bias"])
            if cell.kind == "gru" and cell.reset_after:
                state[f"{prefix}bias"], state[f"{prefix}bias_hh"] = bias
            else:
                state[f"{prefix}bias"] = bias
    return state


def lmu_weights(lmu: Lmu, state: Arrays) -> LmuWeights:
    """The inverse of :func:`layer_state`."""
    own = {name: array for name, array in state.items() if not name.startswith("hidden_cell.")}
    weights = LmuWeights(own)
    for index, cell in enumerate(lmu.hidden):
        prefix = "hidden_cell." if len(lmu.hidden) == 1 else f"hidden_cell.cells.{index}."
        values = {"kernel": _swap_gates(cell.kind, state[f"{prefix}weight_ih"].T)}
        if cell.kind != "dense":
            values["recurrent_kernel"] = _swap_gates(cell.kind, state[f"{prefix}weight_hh"].T)
        if cell.use_bias and cell.kind == "gru" and cell.reset_after:
            values["bias"] = _swap_gates(cell.kind, np.stack([state[f"{prefix}bias"], state[f"{prefix}bias_hh"]]))
        elif cell.use_bias:
            values["bias"] = _swap_gates(cell.kind, state[f"{prefix}bias"])
        weights.hidden.append(values)
    return weights


def _swap_gates(kind: str, array: np.ndarray) -> np.ndarray:
    """Keras orders the gates of a GRU z, r, h, torch r, z, n: a swap, its own inverse. An LSTM's are i, f, c, o in both."""
    if kind != "gru":
        return array
    first, second, third = np.split(array, 3, axis=-1)
    return np.concatenate([second, first, third], axis=-1)


def architecture_of(config: LMUConfig) -> Architecture:
    """The architecture that a configuration of ours describes, for weights that come without one.

    Raises:
        InputError: it describes something that Keras files do not hold.
    """
    unlike = {
        "block_type": "plain",
        "vocab_size": None,
        "encoder_act": None,
        "bidirectional": False,
        "go_backwards": False,
    }
    for name, value in unlike.items():
        if getattr(config, name) != value:
            raise refuse(
                f"a model with {name}={getattr(config, name)!r}",
                f"LMUConfig describes models with {value!r} for conversion, from Keras' JSON others too",
            )
    lmus = []
    for index in range(config.num_hidden_layers):
        theta = config.layer_theta(index)
        if isinstance(theta, list):
            raise refuse("a model with a theta for each memory dimension", "keras-lmu has one per layer")
        specs = config.hidden_cell if isinstance(config.hidden_cell, list) else [config.hidden_cell]
        options: dict[str, Any] = {name: True for name in FLAGS if getattr(config, name)}
        for name in ("dropout", "recurrent_dropout", *REGULARIZERS):
            if getattr(config, name):
                options[name] = getattr(config, name)
        lmus.append(
            Lmu(
                name="",
                class_name="",
                memory_d=config.memory_d,
                order=config.order,
                theta=theta,
                discretizer=config.discretizer,
                hidden=[_hidden_of(spec, config) for spec in specs if spec is not None],
                options=options,
                kernel=config.kernel_initializer is not None,
                return_sequences=index < config.num_hidden_layers - 1 or config.pooling != "last",
            )
        )
    return Architecture(lmus, pooling=config.pooling, head_dropout=config.classifier_dropout, input_size=config.input_size)


def _hidden_of(spec: Any, config: LMUConfig) -> Hidden:
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    kind = options.pop("name")
    if kind not in _DEFAULT_ACTIVATION:
        raise refuse(f"hidden cell {kind!r}", "Keras has no counterpart")
    units = options.pop("hidden_size", config.hidden_size)
    activation = options.pop("activation", None) or config.hidden_act or _DEFAULT_ACTIVATION[kind]
    gate = options.pop("recurrent_activation", "sigmoid")
    bias, reset_after = bool(options.pop("use_bias", True)), bool(options.pop("reset_after", True))
    if not isinstance(units, int):
        raise InputError(f"hidden_size: expected a whole number, found {units!r}")
    return Hidden(kind, units, activation, gate, bias, reset_after)
