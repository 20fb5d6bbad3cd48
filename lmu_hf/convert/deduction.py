"""What weights alone tell of the model that they belong to.

The names and shapes of the two old generations tell all but activations: their A and B hold order, theta and discretizer. The
weights of later ones tell neither order nor theta. What cannot be told is asked for, never guessed; what is usual and does not
show is taken as usual, and noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError
from .source import Source, StoredArray, StoredLayer
from .systems import deduce_system
from .values import MAX_ORDER

_KINDS = {1: "rnn", 3: "gru", 4: "lstm"}  # by the number of gates
Fields = dict[str, Any]


def deduce(source: Source, given: Mapping[str, Any]) -> tuple[Fields, list[str]]:
    """Fields of :class:`LMUConfig` that the weights of a file tell.

    Args:
        source: the file.
        given: fields that the user named; they decide where the weights allow more than one reading.

    Returns:
        The fields, ``given`` included, and notes for the user.

    Raises:
        InputError: the weights leave something open; names what to give.
    """
    if any(layer.numbered for layer in source.layers):
        raise InputError("its weights have no names, only places")
    layers, head = list(source.layers), None
    if len(layers) > 1 and _is_dense(layers[-1]):
        head = layers.pop()
    if not layers or any(_is_dense(layer) for layer in layers):
        raise InputError(f"expected LMUs, and one dense layer behind them at most, found {[x.name for x in source.layers]}")
    found = [_layer(layer, given) for layer in layers]
    fields, thetas = {**found[0]}, [layer.pop("theta") for layer in found]
    for layer, other in zip(layers[1:], found[1:], strict=True):
        differing = [key for key in other if key not in ("input_size", "theta") and other[key] != fields.get(key)]
        if differing:
            key = differing[0]
            raise InputError(f"layer {layer.name!r} has another {key}, {other[key]!r}, than the one before, {fields[key]!r}")
    fields["num_hidden_layers"] = len(found)
    fields["theta"] = thetas[0] if len(set(thetas)) == 1 else [[theta] for theta in thetas]
    if head is not None:
        kernel = _leaves(head)["kernel"]
        fields["num_labels"] = kernel.shape[1]
    taken = [] if "hidden_act" in given or fields["hidden_cell"] is None else [f"hidden_act={_usual(fields)!r}"]
    taken += [] if {"pooling", "return_sequences"} & set(given) else ["pooling='last'"]
    taken += ["problem_type=None (logits)"] if head is not None and "problem_type" not in given else []
    notes = [
        f"the weights tell the architecture but for {', '.join(taken)}, taken as usual; say otherwise by a config, and "
        "compare with outputs of the original"
    ][: len(taken)]
    return {**fields, **given}, notes


def _usual(fields: Fields) -> str:
    cell = fields["hidden_cell"]
    return "linear" if (cell if isinstance(cell, str) else cell["name"]) == "dense" else "tanh"


def _leaves(layer: StoredLayer) -> dict[str, StoredArray]:
    return {array.leaf: array for array in layer.arrays}


def _is_dense(layer: StoredLayer) -> bool:
    leaves = _leaves(layer)
    return len(leaves) == len(layer.arrays) and set(leaves) <= {"kernel", "bias"} and len(leaves["kernel"].shape) == 2


def _layer(layer: StoredLayer, given: Mapping[str, Any]) -> Fields:
    leaves = _leaves(layer)
    fields: Fields = {}
    if "A" in leaves and "B" in leaves:
        matrix, vector = leaves["A"], leaves["B"]
    elif "AT" in leaves and "BT" in leaves:
        matrix, vector = leaves["AT"], leaves["BT"]
    else:
        if missing := [name for name in ("order", "theta") if name not in given]:
            raise InputError(
                f"layer {layer.name!r} has no A and B to tell {' and '.join(missing)}; give at least "
                + ", ".join(f'"{name}"' for name in missing)
            )
        return {"theta": given["theta"], **_connections(layer, {"order": given["order"]}, given)}
    order = max(matrix.shape, default=1)
    for array, expected in ((matrix, [order, order]), (vector, [order])):
        # Not read before its shape is right.
        if order > MAX_ORDER or [size for size in array.shape if size > 1] not in (expected, [1][order:]):
            raise InputError(f"{array.path}: expected {expected} with an order up to {MAX_ORDER:,}, found {array.shape}")
    Ad = matrix.read().reshape(order, order).astype(np.float64).T + (np.eye(order) if matrix.leaf == "AT" else 0)
    theta, discretizer = deduce_system(Ad, vector.read().reshape(order).astype(np.float64))
    fields = {"order": order, "theta": theta, "discretizer": discretizer}
    if matrix.leaf == "A":
        return _connections(layer, fields, given)
    shape = leaves["input_kernel"].shape if "input_kernel" in leaves else ()
    if len(shape) != 2:
        raise InputError(
            f"layer {layer.name!r}: expected a matrix input_kernel of the 2019 cell; there are {sorted(leaves)}"
        )
    cell: Any = "rnn" if {"bias", "hidden_bias"} & set(leaves) else {"name": "rnn", "use_bias": False}
    everything = dict.fromkeys(("hidden_to_memory", "memory_to_memory", "input_to_hidden"), True)
    return fields | everything | {"memory_d": 1, "input_size": shape[0], "hidden_size": shape[1], "hidden_cell": cell}


def _connections(layer: StoredLayer, fields: Fields, given: Mapping[str, Any]) -> Fields:
    """The connections and the hidden cell of a layer with kernel and recurrent_kernel."""
    groups: dict[str, dict[str, StoredArray]] = {}
    for array in layer.arrays:
        groups.setdefault("/".join(array.parents), {})[array.leaf] = array
    # The outermost is the LMU. LMUFFT of the first releases has its memory, a layer of its own with A and B, beside the cell.
    paths = sorted(groups, key=lambda path: (path.count("/"), "A" not in groups[path]))
    own, *others = (groups[path] for path in paths)
    cells = [group for group in others if "A" not in group]
    if len(cells) > 1 or "kernel" not in own or len(own["kernel"].shape) != 2:
        raise InputError(f"layer {layer.name!r}: its groups {paths} leave open what they are")
    rows, dims = own["kernel"].shape
    fields |= {
        "memory_d": dims,
        "memory_to_memory": "recurrent_kernel" in own,
        "use_bias": "bias" in own,
        "trainable_theta": "theta_inv" in own,
    }
    if not cells:
        return fields | {"input_size": rows, "hidden_cell": None, "hidden_size": None}
    (cell,) = cells
    kernel, recurrent = cell.get("kernel"), cell.get("recurrent_kernel")
    if kernel is None or len(kernel.shape) != 2 or (recurrent is not None and len(recurrent.shape) != 2):
        raise InputError(f"layer {layer.name!r}: expected a hidden cell, found {sorted(cell)}")
    units = kernel.shape[1] if recurrent is None else recurrent.shape[0]
    kind = "dense" if recurrent is None else _KINDS.get(recurrent.shape[1] // max(units, 1))
    if kind is None:
        raise InputError(f"layer {layer.name!r}: {recurrent.path} is of no known cell, {recurrent.shape}")  # type: ignore[union-attr]
    options: Fields = {} if "bias" in cell else {"use_bias": False}
    if kind == "gru" and "bias" in cell and len(cell["bias"].shape) == 1:
        options["reset_after"] = False
    fields |= {"hidden_size": units, "hidden_cell": {"name": kind, **options} if options else kind}
    inputs = kernel.shape[0] - dims * fields["order"]
    fields["input_to_hidden"] = inputs > 0
    if not inputs:
        if "input_size" in given:
            inputs = given["input_size"]
        elif "hidden_to_memory" in given:
            inputs = rows - (units if given["hidden_to_memory"] else 0)
        elif rows > units:
            raise InputError(
                f"layer {layer.name!r}: its kernel of {rows} rows is of {rows} inputs, or of {rows - units} and the "
                f'{units} hidden units; give "hidden_to_memory" as true or false'
            )
        else:
            inputs = rows
    return fields | {"input_size": inputs, "hidden_to_memory": rows == inputs + units}
