"""Back to Keras: files that keras-lmu 0.9 under Keras 3 loads.

    import keras, keras_lmu
    model = keras.models.load_model("model.keras")

Each LMU becomes ``RNN(LMUCell(...))``, the form that takes sequences of any length.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lmu_hf

from ..errors import InputError
from ..model.configuration_lmu import LMUConfig
from ..model.modeling_lmu import LMUPreTrainedModel
from .architecture import CELL_CLASSES, FLAGS, REGULARIZERS, Architecture, Head, Hidden, Lmu
from .build import ACTIVATION_OF, architecture_of, lmu_weights
from .files import appearing, check_free
from .graph import refuse
from .source import h5py_module, snake_case
from .values import ACTIVATIONS
from .weights import Arrays

KERAS_VERSION = "3.15.1"  # whose files these look like
_POOLINGS = {"mean": "GlobalAveragePooling1D", "max": "GlobalMaxPooling1D"}
_MODELS = ("LMUModel", "LMUForSequenceClassification", "LMUForTimeSeriesPrediction", "LMUForTokenClassification")

Groups = dict[str, list[np.ndarray]]


def export(model: LMUPreTrainedModel | str | Path, output: str | Path) -> dict[str, Any]:
    """Writes a model of ours for Keras.

    A classifier ends in the softmax or sigmoid that its ``problem_type`` asks for; without one it puts out logits.

    Args:
        model: the model, or the folder of one.
        output: a ``.keras`` file for the whole model, or ``.weights.h5`` for its weights alone.

    Returns:
        ``layers`` (their classes in Keras) and ``parameters``.

    Raises:
        InputError: the folder is no model of ours, the output exists or has another suffix, or the model has a part without a
            counterpart in keras-lmu; names it.
    """
    output = Path(output)
    if not output.name.endswith((".keras", ".weights.h5")):
        raise InputError(f"{output}: expected a name that ends in .keras or .weights.h5")
    check_free(output)
    model = model if isinstance(model, LMUPreTrainedModel) else _load(Path(model))
    layers, groups = _layers(_architecture(model), _state(model))
    weights = _hdf5(groups)
    with appearing(output, folder=False) as target:
        if output.name.endswith(".keras"):
            config = _object("keras", "Sequential", {"name": "lmu_hf", "trainable": True, "layers": layers})
            with zipfile.ZipFile(target, "w") as archive:
                archive.writestr("metadata.json", json.dumps({"keras_version": KERAS_VERSION}))
                archive.writestr("config.json", json.dumps(config))
                archive.writestr("model.weights.h5", weights)
        else:
            target.write_bytes(weights)
    return {
        "layers": [layer["class_name"] for layer in layers],
        "parameters": model.num_parameters(),
    }


def _load(folder: Path) -> LMUPreTrainedModel:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: expected the folder of a model, found no config.json in it")
    try:
        config = LMUConfig.from_pretrained(folder)
        name = (config.architectures or ["LMUModel"])[0]
        if name not in _MODELS:
            raise refuse(f"{folder}: a model of class {name}", f"expected one of {list(_MODELS)}")
        return getattr(lmu_hf, name).from_pretrained(folder)
    except InputError:
        raise
    except Exception as error:  # transformers raises many kinds for a folder that it cannot load
        raise InputError(f"{folder}: not a model that can be loaded: {' '.join(str(error).split())[:200]}") from error


def _state(model: LMUPreTrainedModel) -> Arrays:
    """The weights as arrays, float32 or float64, under the names of LMUModel."""
    state = {}
    for name, tensor in model.state_dict().items():
        wide = tensor.detach().cpu().to(torch.promote_types(tensor.dtype, torch.float32))
        state[name.removeprefix("model.")] = wide.numpy()
    return state


def _architecture(model: LMUPreTrainedModel) -> Architecture:
    name, config = type(model).__name__, model.config
    if name not in _MODELS:
        raise refuse(f"a model of class {name}", f"expected one of {list(_MODELS)}")
    architecture = architecture_of(config)
    every = name == "LMUForTokenClassification" or (name != "LMUForSequenceClassification" and config.return_sequences)
    architecture.lmus[-1].return_sequences = every or config.pooling != "last"
    if name == "LMUModel":
        if config.pooling != "last" and not every:
            raise refuse(f"a model with pooling={config.pooling!r} and without a head", "what is put out is every step")
        architecture.pooling = None if every else "last"
    else:
        units = model.get_submodule("score").out_features
        token = name == "LMUForTokenClassification"
        activation = (
            "linear"
            if "TimeSeries" in name
            else "softmax"
            if token
            else ACTIVATION_OF.get(config.problem_type or "", "linear")
        )
        architecture.head = Head("", units, activation, per_step=every)  # type: ignore[arg-type]
        if every:
            architecture.pooling = None
    return architecture


def _object(module: str, kind: str, config: dict[str, Any], registered: str | None = None) -> dict[str, Any]:
    return {"module": module, "class_name": kind, "config": config, "registered_name": registered}


def _layers(architecture: Architecture, state: Arrays) -> tuple[list[dict[str, Any]], Groups]:
    """The serialized layers, and the arrays of each group of the weights' file."""
    dtype = "float64" if any(array.dtype == np.float64 for array in state.values()) else "float32"
    shape = [None, None, architecture.input_size]
    layers = [_object("keras.layers", "InputLayer", {"batch_shape": shape, "dtype": dtype, "name": "input_layer"})]
    groups: Groups = {}
    for index, lmu in enumerate(architecture.lmus):
        prefix = f"layers.{index}.lmu.cell."
        own = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
        name = "rnn" if index == 0 else f"rnn_{index}"
        config = {"name": name, "dtype": dtype, "return_sequences": lmu.return_sequences, "cell": _cell(lmu, dtype, index)}
        layers.append(_object("keras.layers", "RNN", config))
        weights = lmu_weights(lmu, own)
        roles = ("kernel", "bias", "theta_inv", "recurrent_kernel")
        groups[f"layers/{name}/cell"] = [weights.own[role] for role in roles if role in weights.own]
        if lmu.has("dropout") or lmu.has("recurrent_dropout"):
            groups[f"layers/{name}/cell/seed_generator"] = [np.array([0, 0], np.uint32)]
        counts: dict[str, int] = {}
        for cell, values in zip(lmu.hidden, weights.hidden, strict=True):
            group = f"layers/{name}/cell/hidden_cell"
            if len(lmu.hidden) > 1:
                base = snake_case(CELL_CLASSES[cell.kind])
                counts[base] = counts.get(base, -1) + 1
                group += f"/cells/{base}" + (f"_{counts[base]}" if counts[base] else "")
            groups[group] = list(values.values())
    if architecture.pooling in _POOLINGS:
        kind = _POOLINGS[architecture.pooling]
        layers.append(_object("keras.layers", kind, {"name": snake_case(kind), "dtype": dtype}))
    if architecture.head is not None:
        if architecture.head_dropout:
            config = {"name": "dropout", "dtype": dtype, "rate": architecture.head_dropout, "seed": None}
            layers.append(_object("keras.layers", "Dropout", config))
            groups["layers/dropout/seed_generator"] = [np.array([0, 0], np.uint32)]
        head = architecture.head
        config = {"name": "dense", "dtype": dtype, "units": head.units, "activation": head.activation, "use_bias": True}
        layers.append(_object("keras.layers", "Dense", config))
        groups["layers/dense"] = [state["score.weight"].T, state["score.bias"]]
    return layers, groups


def _cell(lmu: Lmu, dtype: str, index: int) -> dict[str, Any]:
    cells = [_hidden(cell, dtype, f"{index}_{place}") for place, cell in enumerate(lmu.hidden)]
    hidden = cells[0] if cells else None
    if len(cells) > 1:
        hidden = _object("keras.layers", "StackedRNNCells", {"name": f"stacked_{index}", "dtype": dtype, "cells": cells})
    config = {
        "name": f"lmu_cell_{index}",
        "dtype": dtype,
        "memory_d": lmu.memory_d,
        "order": lmu.order,
        "theta": lmu.theta,
        "hidden_cell": hidden,
        **{flag: lmu.has(flag) for flag in FLAGS},
        "discretizer": lmu.discretizer,
        "kernel_initializer": "glorot_uniform" if lmu.kernel else None,
        "dropout": lmu.options.get("dropout", 0),
        "recurrent_dropout": lmu.options.get("recurrent_dropout", 0),
    }
    for name in REGULARIZERS:
        config[name] = _regularizer(lmu.options.get(name))
    return _object("keras_lmu.layers", "LMUCell", config, "keras-lmu>LMUCell")


def _regularizer(spec: Any) -> dict[str, Any] | None:
    if spec is None:
        return None
    spec = {"name": spec} if isinstance(spec, str) else dict(spec)
    kind = {"l1": "L1", "l2": "L2", "l1_l2": "L1L2"}[spec.pop("name")]
    defaults = {"L1": {"l1": 0.01}, "L2": {"l2": 0.01}, "L1L2": {"l1": 0.01, "l2": 0.01}}[kind]
    return _object("keras.regularizers", kind, {**defaults, **spec})


def _hidden(cell: Hidden, dtype: str, suffix: str) -> dict[str, Any]:
    kind = CELL_CLASSES[cell.kind]
    for name in (cell.activation, cell.recurrent_activation):
        if name not in ACTIVATIONS.values():  # Keras 3 has no hard_sigmoid of Keras 2
            raise refuse(f"a hidden cell with activation {name!r}", "that of Keras with this name computes something else")
    config: dict[str, Any] = {"name": f"{snake_case(kind)}_{suffix}", "dtype": dtype, "units": cell.units}
    config |= {"activation": cell.activation, "use_bias": cell.use_bias}
    if cell.kind in ("lstm", "gru"):
        config["recurrent_activation"] = cell.recurrent_activation
    if cell.kind == "gru":
        config["reset_after"] = cell.reset_after
    return _object("keras.layers", kind, config)


def _hdf5(groups: Groups) -> bytes:
    buffer = io.BytesIO()
    with h5py_module().File(buffer, "w") as file:
        for group, arrays in groups.items():
            for place, array in enumerate(arrays):
                file[f"{group}/vars/{place}"] = np.array(array, order="C")
        file.require_group("vars")
    return buffer.getvalue()
