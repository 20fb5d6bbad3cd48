"""Whose weights are whose: the layers and arrays of a file, matched with the parts of an architecture.

Older files have names ("lmu/lmu_cell/simple_rnn_cell/kernel:0"), newer ones places ("lmu/hidden_cell/vars/0"). Both become
one dictionary per layer: (owner, role) -> array, where the owner is "own" for the LMU, "inner" for the memory inside of an
LMUFFT, and a number for a hidden cell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .architecture import CELL_CLASSES, Architecture, Hidden, Lmu
from .source import Source, StoredArray, StoredLayer, natural, snake_case

Key = tuple[str | int, str]
FIRST_PAPER = ("input_encoders", "hidden_encoders", "memory_encoders", "input_kernel", "hidden_kernel", "memory_kernel")


class Pool:
    """The arrays of one layer that are still to be taken, by owner and role."""

    def __init__(self, what: str, arrays: dict[Key, StoredArray]):
        self.what, self.arrays = what, arrays

    def has(self, owner: str | int, role: str) -> bool:
        """Whether there is such an array."""
        return (owner, role) in self.arrays

    def shape(self, owner: str | int, role: str) -> tuple[int, ...]:
        """Its shape, () if there is none."""
        return self.arrays[owner, role].shape if self.has(owner, role) else ()

    def take(self, owner: str | int, role: str, shape: tuple[int, ...]) -> np.ndarray:
        """Reads an array, after its shape was found right.

        Raises:
            InputError: it is missing or has another shape.
        """
        array = self.arrays.pop((owner, role), None)
        if array is None:
            there = [f"{array.path} {array.shape}" for array in self.arrays.values()]
            raise InputError(
                f"{self.what}: expected a weight {role} of shape {shape}, found none; there are {', '.join(there[:8]) or 'none'}"
            )
        if array.shape != shape:
            raise InputError(f"{self.what}: {array.path}: expected shape {shape}, found {array.shape}")
        return array.read()

    def take_squeezed(self, owner: str | int, role: str, shape: tuple[int, ...]) -> np.ndarray:
        """Reads a matrix or vector that may have axes of one more, less or elsewhere: (1, 6, 6) for (6, 6), (6,) for (1, 6)."""
        array = self.arrays.get((owner, role))
        if array is not None and [size for size in array.shape if size != 1] == [size for size in shape if size != 1]:
            del self.arrays[owner, role]
            return array.read().reshape(shape)
        return self.take(owner, role, shape)

    def check_empty(self) -> None:
        """Raises InputError if something is left: the model was another one then."""
        if self.arrays:
            left = [f"{array.path} {array.shape}" for array in self.arrays.values()]
            raise InputError(f"{self.what}: the architecture has no place for the weights {', '.join(left[:8])}")


def pool_of_dense(what: str, layer: StoredLayer | None) -> Pool:
    """The arrays of a dense layer."""
    return _pool_of_one(what, layer, [("kernel", _is_matrix), ("bias", _is_vector)])


def pool_of_embedding(what: str, layer: StoredLayer) -> Pool:
    """The array of an embedding."""
    return _pool_of_one(what, layer, [("embeddings", _is_matrix)])


def _pool_of_one(what: str, layer: StoredLayer | None, roles: list[Role]) -> Pool:
    """The arrays of a layer without parts, by their names or else by the roles in the order of their places."""
    arrays = [] if layer is None else _real(layer)
    if layer is not None and layer.numbered:
        return Pool(what, _numbered("own", arrays, roles, what))
    return Pool(what, _unique([(("own", _leaf(array)), array) for array in arrays], what))


def directions(layer: StoredLayer) -> tuple[StoredLayer, StoredLayer]:
    """The arrays of the two directions of a bidirectional layer."""
    forward: list[StoredArray] = []
    backward: list[StoredArray] = []
    for array in layer.arrays:
        found = {part.split("_", 1)[0] for part in array.parents} & {"forward", "backward"}
        if len(found) != 1:
            raise InputError(f"layer {layer.name!r}: {array.path}: expected forward_... or backward_... in its path")
        (forward if found == {"forward"} else backward).append(array)
    return StoredLayer(layer.name, forward, layer.numbered), StoredLayer(layer.name, backward, layer.numbered)


def pool_of_lmu(what: str, layer: StoredLayer | None, lmu: Lmu) -> Pool:
    """The arrays of an LMU layer."""
    arrays = [] if layer is None else _real(layer)
    cells = [cell for cell in lmu.hidden if cell.layer is None]
    if layer is not None and layer.numbered:
        return Pool(what, _lmu_by_place(arrays, lmu, cells, what))
    return Pool(what, _lmu_by_name(arrays, lmu, cells, what))


def _real(layer: StoredLayer) -> list[StoredArray]:
    """The arrays, less the state of random number generators."""
    return [array for array in layer.arrays if "seed_generator" not in array.path]


def _leaf(array: StoredArray) -> str:
    return _base(array.leaf)


def _base(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _unique(pairs: Sequence[tuple[Key, StoredArray]], what: str) -> dict[Key, StoredArray]:
    found: dict[Key, StoredArray] = {}
    for key, array in pairs:
        if key in found:
            raise InputError(f"{what}: {found[key].path} and {array.path} could both be {key[1]}; their names do not tell")
        found[key] = array
    return found


# ---------------------------------------------------------------- by name


def _lmu_by_name(arrays: list[StoredArray], lmu: Lmu, cells: list[Hidden], what: str) -> dict[Key, StoredArray]:
    groups: dict[tuple[str, ...], list[StoredArray]] = {}
    for array in arrays:
        groups.setdefault(tuple(array.parents), []).append(array)
    owners: dict[tuple[str, ...], str | int] = {}
    first_paper = lmu.first_paper or any(_leaf(array) in ("AT", "input_encoders") for array in arrays)
    if not first_paper:
        # The group of a hidden cell ends in its name. A file of a model that was built anew counts the names differently, and an
        # architecture of ours has none: then the class in the name and the order tell.
        for index, cell in enumerate(cells):
            if exact := [group for group in groups if cell.name and group and group[-1] == cell.name]:
                owners[exact[0]] = index
        for index, cell in enumerate(cells):
            base = _base(cell.name or snake_case(CELL_CLASSES[cell.kind]))
            same = [group for group in groups if group not in owners and group and _base(group[-1]) == base]
            if index not in owners.values() and same:
                owners[same[0]] = index
    # Of what is left the outermost is the LMU, that with A before others; LMUFFT of the first releases has its memory, a layer of
    # its own with A, inside.
    leaves = {path: {_leaf(array) for array in group} for path, group in groups.items()}
    own = sorted(
        (group for group in groups if group not in owners), key=lambda group: (len(group), "A" not in leaves[group])
    )
    unnamed = [index for index in range(len(cells)) if index not in owners.values()]
    foreign = [group for group in own[1:] if "A" not in leaves[group]]
    if len(cells) == len(unnamed) == len(foreign) == 1:
        # A hidden cell under a name that says nothing.
        owners[foreign[0]] = 0
        own.remove(foreign[0])
    for group in own:
        owners[group] = "own" if len(group) == len(own[0]) else "inner"
    if len(groups) == len(cells) == 1 and not first_paper:
        return _lmu_by_shape(arrays, lmu, what)
    pairs = [((owners[tuple(array.parents)], _leaf(array)), array) for array in arrays]
    return _unique(pairs, what)


def _lmu_by_shape(arrays: list[StoredArray], lmu: Lmu, what: str) -> dict[Key, StoredArray]:
    """Where LMU and hidden cell share a group: kernel, kernel_1. The LMU's come first in a file."""
    dims = lmu.memory_d
    own: dict[str, Callable[[StoredArray], bool]] = {
        "kernel": lambda array: lmu.kernel and array.shape[1:] == (dims,),
        "recurrent_kernel": lambda array: lmu.has("memory_to_memory") and array.shape == (dims * (lmu.order or 0), dims),
        "bias": lambda array: lmu.has("use_bias") and array.shape == (dims,),
    }
    pairs: list[tuple[Key, StoredArray]] = []
    for array in arrays:
        leaf = _leaf(array)
        mine = leaf not in own or (own[leaf](array) and not any(key == ("own", leaf) for key, _ in pairs))
        pairs.append((("own" if mine else 0, leaf), array))
    return _unique(pairs, what)


# ---------------------------------------------------------------- by place

Role = tuple[str, Callable[[StoredArray], bool]]


def _is_matrix(array: StoredArray) -> bool:
    return len(array.shape) == 2


def _is_vector(array: StoredArray) -> bool:
    return len(array.shape) == 1


def _numbered(owner: str | int, arrays: list[StoredArray], roles: list[Role], what: str) -> dict[Key, StoredArray]:
    """Gives each array the first role, in the order in which Keras creates the weights, that its shape allows."""
    found: dict[Key, StoredArray] = {}
    left = list(roles)
    for array in arrays:
        role = next((role for role in left if role[1](array)), None)
        if role is None:
            raise InputError(f"{what}: {array.path}: the architecture has no place for a weight of shape {array.shape}")
        left.remove(role)
        found[owner, role[0]] = array
    return found


def _shaped(*shape: int) -> Callable[[StoredArray], bool]:
    return lambda array: array.shape == shape


def _lmu_by_place(arrays: list[StoredArray], lmu: Lmu, cells: list[Hidden], what: str) -> dict[Key, StoredArray]:
    groups: dict[str, list[StoredArray]] = {}
    for array in arrays:
        groups.setdefault(array.path.rpartition("vars/")[0].strip("/"), []).append(array)
    hidden = {path: group for path, group in groups.items() if "hidden_cell" in path.split("/")}
    own = {path: group for path, group in groups.items() if path not in hidden}
    found: dict[Key, StoredArray] = {}
    every = [array for group in own.values() for array in group]
    if lmu.first_paper or (not hidden and [a.shape for a in every[6:8]] == [(lmu.order, lmu.order), (1, lmu.order)]):
        places: list[Role] = [(name, lambda array: True) for name in (*FIRST_PAPER, "AT", "BT", "bias")]
        return _numbered("own", every, places, what)
    dims, order = lmu.memory_d, lmu.order or 0
    first_release = any(array.shape == (1, order) for group in own.values() for array in group[2:])
    roles: list[Role] = []
    if lmu.kernel or first_release:
        roles.append(("kernel", lambda array: _is_matrix(array) and array.shape[1] == dims))
    roles += [
        ("bias", _shaped(dims)),
        ("theta_inv", _shaped()),
        ("recurrent_kernel", _shaped(dims * order, dims)),
        ("A", _shaped(order, order)),
        ("B", _shaped(1, order)),
    ]
    inner: list[Role] = [("kernel", _shaped(dims, dims)), ("A", _shaped(order, order)), ("B", _shaped(1, order))]
    for path, group in own.items():
        if "delay_layer" in path.split("/"):
            found |= _numbered("inner", group, inner if len(group) > 2 else inner[1:], what)
        else:
            found |= _numbered("own", group, roles, what)
    for index, path in enumerate(_cell_paths(hidden, cells, what)):
        matrices: list[Role] = [("kernel", _is_matrix)]
        if cells[index].kind != "dense":
            matrices.append(("recurrent_kernel", _is_matrix))
        found |= _numbered(index, hidden[path], [*matrices, ("bias", lambda array: True)], what)
    return found


def _cell_paths(hidden: dict[str, Any], cells: list[Hidden], what: str) -> list[str]:
    """The group of each cell. Those of a stack are named by class and counted per class."""
    if len(hidden) != len(cells):
        raise InputError(f"{what}: expected weights of {len(cells)} hidden cells, found those of {sorted(hidden) or 'none'}")
    by_class: dict[str, list[str]] = {}
    for path in sorted(hidden, key=natural):
        by_class.setdefault(_base(path.rsplit("/", 1)[-1]), []).append(path)
    if len(cells) == 1:
        return list(hidden)
    paths = []
    for cell in cells:
        same = by_class.get(snake_case(CELL_CLASSES[cell.kind]), [])
        if not same:
            raise InputError(f"{what}: expected weights of a {CELL_CLASSES[cell.kind]}, found those of {sorted(hidden)}")
        paths.append(same.pop(0))
    return paths


# ---------------------------------------------------------------- layers


def _parts(layer: StoredLayer, nested: list[str]) -> list[StoredLayer]:
    """The layer, or the layers of a model inside of the model, whose weights are saved as those of one layer."""
    if layer.numbered or layer.name not in nested:
        return [layer]
    parts: dict[str, list[StoredArray]] = {}
    for array in layer.arrays:
        names = [name for name in array.parents if name not in nested]
        parts.setdefault(names[0] if names else "", []).append(array)
    return [StoredLayer(name, arrays) for name, arrays in parts.items()]


def match_layers(architecture: Architecture, source: Source) -> dict[tuple[str, int], StoredLayer]:
    """The layer of the file for each part: ("lmu", index), ("cell", index) for a dense hidden cell, ("head", 0).

    Raises:
        InputError: a layer is missing or left over.
    """
    items: list[tuple[tuple[str, int], str, str]] = []
    bare = set()  # layers that need not have weights
    if architecture.embedding is not None:
        items.append((("embedding", 0), architecture.embedding.name, "Embedding"))
    for index, lmu in enumerate(architecture.lmus):
        items.append((("lmu", index), lmu.name, lmu.class_name))
        if not lmu.kernel and not lmu.options and not any(cell.layer is None for cell in lmu.hidden):
            bare.add(("lmu", index))
        items += [(("cell", index), cell.layer, "Dense") for cell in lmu.hidden if cell.layer is not None]
    if architecture.head is not None:
        items.append((("head", 0), architecture.head.name, architecture.head.class_name))
    layers = [part for layer in source.layers if _real(layer) for part in _parts(layer, architecture.nested)]
    by_name = {layer.name: layer for layer in layers}

    def in_order(items: list, layers: list[StoredLayer]) -> dict[tuple[str, int], StoredLayer]:
        needed = [item for item in items if item[0] not in bare]
        for wanted in (items, needed):
            if len(wanted) == len(layers):
                return {key: layer for (key, _, _), layer in zip(wanted, layers, strict=True)}
        raise InputError(
            f"{source.name}: expected weights of {[name or key[0] for key, name, _ in needed]}, found those of "
            f"{[layer.name for layer in layers][:10]}"
        )

    if not any(layer.numbered for layer in layers):
        if all(name in by_name for key, name, _ in items if key not in bare):
            found = {key: by_name[name] for key, name, _ in items if name in by_name}
        else:
            found = in_order(items, layers)
    elif all(kind for _, _, kind in items):
        # Keras names these groups by class and counts them: lmu, lmu_1, ... Its versions count differently; the order holds.
        found = {}
        for kind in {kind for _, _, kind in items}:
            group = [layer for layer in layers if _base(layer.name) == snake_case(kind)]
            if len({layer.inside for layer in group}) > 1:
                raise InputError(
                    f"{source.name}: {[layer.name for layer in group]} lie in different models inside of the model, and nothing "
                    "tells their order; save it as .h5"
                )
            found |= in_order([item for item in items if item[2] == kind], group)
    else:
        found = in_order(items, sorted(layers, key=lambda layer: (_base(layer.name) == "dense", natural(layer.name))))
    if left := [layer.name for layer in layers if layer not in found.values()]:
        raise InputError(f"{source.name}: the architecture has no place for the weights of {left[:5]}")
    return found
