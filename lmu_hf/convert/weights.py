"""The weights of all generations in one form.

| generation            | weights of an LMU cell                                                                     |
|-----------------------|--------------------------------------------------------------------------------------------|
| 2019 (lmu 0.1)        | input_, hidden_, memory_encoders; input_, hidden_, memory_kernel; AT = (Ad - I)^T, BT      |
| first keras-lmu       | kernel, recurrent_kernel, A = Ad^T, B = Bd^T; its LMUFFT has a second kernel, always 1     |
| keras-lmu from 0.4 on | kernel, bias, theta_inv, recurrent_kernel                                                  |

Keras computes x @ W; its kernels are (inputs, outputs).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..errors import InputError
from .architecture import Architecture, Hidden, Lmu
from .graph import refuse
from .matching import FIRST_PAPER, Pool, directions, match_layers, pool_of_dense, pool_of_embedding, pool_of_lmu
from .source import Source
from .systems import recognise
from .values import MAX_ORDER

_GATES = {"rnn": 1, "lstm": 4, "gru": 3, "dense": 1}
Arrays = dict[str, np.ndarray]


@dataclass
class LmuWeights:
    """Weights of one LMU in Keras' orientation: kernel (enc_d, memory_d), recurrent_kernel (memory_d * order, memory_d), bias
    (memory_d,), theta_inv (), and kernel, recurrent_kernel and bias of each hidden cell; those of the direction that runs
    backwards, if there is one."""

    own: Arrays = field(default_factory=dict)
    hidden: list[Arrays] = field(default_factory=list)
    backward: LmuWeights | None = None


@dataclass
class Weights:
    """All weights: of the LMUs in order, of the head, of the embedding; and the features per step of the first layer."""

    lmus: list[LmuWeights]
    head: Arrays
    input_size: int
    embedding: np.ndarray | None = None


def read_weights(architecture: Architecture, source: Source) -> Weights:
    """Reads the weights of an architecture; what the file's arrays alone tell (theta of the 2019 cell) is filled in there.

    Raises:
        InputError: a weight is missing, has another shape or is left over, or the memory is not the Legendre system.
    """
    stored = match_layers(architecture, source)
    size, lmus, table = architecture.input_size, [], None
    if architecture.embedding is not None:
        name, tokens, width = architecture.embedding.name, architecture.embedding.tokens, architecture.embedding.size
        pool = pool_of_embedding(f"{source.name}: layer {name!r}", stored[("embedding", 0)])
        table = pool.take("own", "embeddings", (tokens, width))
        pool.check_empty()
    for index, lmu in enumerate(architecture.lmus):
        what, layer = f"{source.name}: layer {lmu.name or index!r}", stored.get(("lmu", index))
        found = []
        for direction in directions(layer) if lmu.bidirectional and layer is not None else [layer]:
            pool = pool_of_lmu(what, direction, lmu)
            paper = lmu.first_paper or pool.has("own", "input_encoders")
            found.append((_read_first_paper if paper else _read_lmu)(lmu, pool, size, architecture.notes))
            pool.check_empty()
            size = found[0][0]
        assert size is not None
        weights = found[0][1]
        weights.backward = found[1][1] if lmu.bidirectional else None
        if index == 0:
            input_size: int = size
        for cell, values in zip(lmu.hidden, weights.hidden, strict=True):
            if cell.layer is not None:
                dense = pool_of_dense(f"{source.name}: layer {cell.layer!r}", stored.get(("cell", index)))
                values.update(_read_cell(cell, dense, "own", _features(lmu, size)))
                dense.check_empty()
        lmus.append(weights)
        size = (lmu.hidden[-1].units if lmu.hidden else _features(lmu, size)) * (2 if lmu.bidirectional else 1)
    assert size is not None
    head: Arrays = {}
    if architecture.head is not None:
        pool = pool_of_dense(f"{source.name}: layer {architecture.head.name!r}", stored.get(("head", 0)))
        head["kernel"] = pool.take("own", "kernel", (size, architecture.head.units))
        if architecture.head.use_bias is None:
            architecture.head.use_bias = pool.has("own", "bias")
        if architecture.head.use_bias:
            head["bias"] = pool.take("own", "bias", (architecture.head.units,))
        pool.check_empty()
    return Weights(lmus, head, input_size, table)


def _features(lmu: Lmu, input_size: int) -> int:
    """Inputs of the first hidden cell."""
    assert lmu.order is not None
    return lmu.memory_d * lmu.order + (input_size if lmu.has("input_to_hidden") else 0)


def _read_lmu(lmu: Lmu, pool: Pool, input_size: int | None, notes: list[str]) -> tuple[int, LmuWeights]:
    assert lmu.order is not None
    order, dims, weights = lmu.order, lmu.memory_d, LmuWeights()
    fed_back = lmu.hidden[0].units if lmu.has("hidden_to_memory") and lmu.hidden else 0
    if lmu.has("hidden_to_memory") and not lmu.hidden:
        raise refuse(pool.what, "hidden_to_memory without a hidden cell")
    # The first releases, known by their A, took kernel_initializer=None for Keras' default and had a kernel all the same.
    lmu.kernel = lmu.kernel or (pool.has("own", "A") and pool.has("own", "kernel"))
    if lmu.kernel:
        rows = pool.shape("own", "kernel")[:1]
        enc_d: int = input_size + fed_back if input_size is not None else (*rows, 0)[0]
        weights.own["kernel"] = pool.take("own", "kernel", (enc_d, dims))
        input_size = enc_d - fed_back
    elif input_size is None:
        input_size = dims - fed_back
    if input_size < 1 or (not lmu.kernel and input_size + fed_back != dims):
        raise InputError(f"{pool.what}: memory_d={dims} and {input_size} inputs do not fit together")
    roles: list[tuple[str, tuple[int, ...], bool]] = [
        ("bias", (dims,), lmu.has("use_bias")),
        ("theta_inv", (), lmu.has("trainable_theta")),
        ("recurrent_kernel", (dims * order, dims), lmu.has("memory_to_memory")),
    ]
    for role, shape, wanted in roles:
        if wanted:
            weights.own[role] = pool.take("own", role, shape)
    if "theta_inv" in weights.own and not float(weights.own["theta_inv"]) > 0:
        raise refuse(pool.what, f"theta_inv={float(weights.own['theta_inv']):g}; a window has a positive length")
    if pool.has("inner", "kernel"):
        # A one that LMUFFT of the first releases measures its impulse response with when it is built, and never trains.
        pool.take("inner", "kernel", (dims, dims))
    for owner in ("own", "inner"):
        if pool.has(owner, "A"):
            Ad = pool.take_squeezed(owner, "A", (order, order)).astype(np.float64).T
            Bd = pool.take_squeezed(owner, "B", (1, order)).astype(np.float64)[0]
            recognise(lmu, Ad, Bd, pool.what, notes)
    size = _features(lmu, input_size)
    for index, cell in enumerate(lmu.hidden):
        weights.hidden.append({} if cell.layer is not None else _read_cell(cell, pool, index, size))
        size = cell.units
    return input_size, weights


def _read_cell(cell: Hidden, pool: Pool, owner: str | int, input_size: int) -> Arrays:
    units, gates = cell.units, _GATES[cell.kind]
    values = {"kernel": pool.take(owner, "kernel", (input_size, gates * units))}
    if cell.kind != "dense":
        values["recurrent_kernel"] = pool.take(owner, "recurrent_kernel", (units, gates * units))
    if cell.use_bias:
        values["bias"] = pool.take(
            owner, "bias", (2, gates * units) if cell.kind == "gru" and cell.reset_after else (gates * units,)
        )
    return values


def _read_first_paper(lmu: Lmu, pool: Pool, input_size: int | None, notes: list[str]) -> tuple[int, LmuWeights]:
    """The 2019 cell: u = x e_x + h e_h + m e_m; m = m + m AT + u BT; h = f(x W_x + h W_h + m W_m)."""
    cell = lmu.hidden[0] if len(lmu.hidden) == 1 else None
    if cell is None or cell.kind != "rnn" or lmu.memory_d != 1:
        raise InputError(f"{pool.what}: the weights are those of the 2019 cell, with one memory and a plain hidden cell")
    found = {
        "units": (cell.units, pool.shape("own", "hidden_kernel")[:1]),
        "order": (lmu.order, pool.shape("own", "AT")[-1:]),
        "input_size": (input_size, pool.shape("own", "input_kernel")[:1]),
    }
    sizes: list[int] = []
    for name, (declared, stored) in found.items():
        sizes.append(declared or (stored[0] if stored else 0))
        if not 1 <= sizes[-1] <= (MAX_ORDER if name == "order" else 1 << 24):
            raise InputError(f"{pool.what}: {name}: expected a size from the weights of the 2019 cell, found {sizes[-1]}")
    units, order, inputs = sizes
    cell.units, lmu.order = units, order
    shapes = ((inputs, 1), (units, 1), (order, 1), (inputs, units), (units, units), (order, units))
    e_x, e_h, e_m, W_x, W_h, W_m = (
        # The encoders are vectors, lying or standing.
        (pool.take_squeezed if shape[1] == 1 else pool.take)("own", role, shape)
        for role, shape in zip(FIRST_PAPER, shapes, strict=True)
    )
    Ad = np.eye(order) + pool.take_squeezed("own", "AT", (order, order)).astype(np.float64).T
    recognise(lmu, Ad, pool.take_squeezed("own", "BT", (1, order)).astype(np.float64)[0], pool.what, notes)
    hidden = {"kernel": np.concatenate([W_m, W_x]), "recurrent_kernel": W_h}
    cell.use_bias = False
    for role in ("bias", "hidden_bias"):
        if pool.has("own", role):
            hidden["bias"], cell.use_bias = pool.take("own", role, (units,)), True
    lmu.kernel = True
    lmu.options |= {"hidden_to_memory": True, "memory_to_memory": True, "input_to_hidden": True}
    return inputs, LmuWeights({"kernel": np.concatenate([e_x, e_h]), "recurrent_kernel": e_m}, [hidden])
