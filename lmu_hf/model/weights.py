"""Initializers and regularizers by name, with the names and defaults of Keras.

A specification is a name (``"glorot_uniform"``) or a mapping with a name and parameters (``{"name": "constant", "value":
0.5}``). Where a matrix acts on several concatenated inputs, an initializer may also be given per block, each block
initialised as a matrix of its own: ``{"input": "ones", "hidden": "zeros"}``.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Spec = str | Mapping[str, Any]

# Parameters of each initializer with their defaults.
INITIALIZERS: dict[str, dict[str, float]] = {
    "glorot_uniform": {"gain": 1.0},
    "glorot_normal": {"gain": 1.0},
    "lecun_uniform": {},
    "lecun_normal": {},
    "he_uniform": {},
    "he_normal": {},
    "orthogonal": {"gain": 1.0},
    "uniform": {"low": -0.05, "high": 0.05},
    "normal": {"mean": 0.0, "std": 0.05},
    "zeros": {},
    "ones": {},
    "constant": {"value": 0.0},
}

REGULARIZERS: dict[str, dict[str, float]] = {
    "l1": {"l1": 0.01},
    "l2": {"l2": 0.01},
    "l1_l2": {"l1": 0.01, "l2": 0.01},
}


def _resolve(field: str, spec: Any, known: dict[str, dict[str, float]]) -> tuple[str, dict[str, float]]:
    if isinstance(spec, str):
        name, given = spec, {}
    elif isinstance(spec, Mapping) and "name" in spec:
        name, given = spec["name"], {key: value for key, value in spec.items() if key != "name"}
    else:
        raise ValueError(f"{field}: expected a name or a mapping with 'name', found {spec!r}; names: {sorted(known)}")
    if name not in known:
        raise ValueError(f"{field}: expected one of {sorted(known)}, found {name!r}")
    for key, value in given.items():
        if key not in known[name]:
            raise ValueError(f"{field}: {name} takes {sorted(known[name]) or 'no parameters'}, found {key!r}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{field}: expected a finite number for {key}, found {value!r}")
    return name, {**known[name], **given}


def _is_per_block(spec: Any) -> bool:
    return isinstance(spec, Mapping) and "name" not in spec


def check_initializer(field: str, spec: Any, blocks: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless ``spec`` names an initializer, or one for each of ``blocks``.

    Args:
        field: the name to show in the message.
        spec: the specification.
        blocks: names of the blocks that the initialised matrix is made of.
    """
    if not _is_per_block(spec):
        _resolve(field, spec, INITIALIZERS)
        return
    if unknown := sorted(set(spec) - set(blocks)):
        expected = f"blocks {list(blocks)}" if blocks else "a name, since this weight has no blocks"
        raise ValueError(f"{field}: expected {expected}, found {unknown}")
    if missing := sorted(set(blocks) - set(spec)):
        raise ValueError(f"{field}: expected an initializer for every block, found none for {missing}")
    for block, block_spec in spec.items():
        _resolve(f"{field}.{block}", block_spec, INITIALIZERS)


def check_regularizer(field: str, spec: Any) -> None:
    """Raises ValueError unless ``spec`` is None or names a regularizer with non-negative factors."""
    if spec is None:
        return
    _, factors = _resolve(field, spec, REGULARIZERS)
    for key, value in factors.items():
        if value < 0:
            raise ValueError(f"{field}: expected {key} >= 0, found {value}")


@torch.no_grad()
def initialize_(
    field: str, weight: Tensor, spec: Spec, blocks: Mapping[str, int] | None = None, *, inputs_first: bool = False
) -> None:
    """Fills a weight in place, unless transformers has marked it as loaded from a checkpoint.

    Args:
        field: the name to show in an error.
        weight: a bias (out,), a weight (out, in) that acts as ``F.linear(x, weight)``, or a kernel (in, out).
        spec: the initializer's specification.
        blocks: name -> number of inputs, in order, of the parts of the concatenated input of the weight. Needed for a
            specification per block.
        inputs_first: the weight is a kernel (in, out) that acts as ``x @ kernel``.
    """
    check_initializer(field, spec, tuple(blocks or ()))
    if is_loaded(weight):
        return
    # Drawn in float32 or better: QR, for one, does not exist in half precision.
    drawn = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    oriented = drawn.mT if inputs_first else drawn
    if _is_per_block(spec):
        assert isinstance(spec, Mapping)
        assert blocks is not None
        for block, part in zip(blocks, oriented.split(list(blocks.values()), dim=1), strict=True):
            if part.numel():
                _fill_(part, *_resolve(f"{field}.{block}", spec[block], INITIALIZERS))
    else:
        _fill_(oriented, *_resolve(field, spec, INITIALIZERS))
    weight.copy_(drawn)


def is_loaded(weight: Tensor) -> bool:
    """Whether transformers has marked a weight as loaded from a checkpoint, which must not be initialised again."""
    return bool(getattr(weight, "_is_hf_initialized", False))


def _fill_(weight: Tensor, name: str, parameters: dict[str, float]) -> None:
    fan_in = weight.shape[-1] if weight.ndim > 1 else 1
    match name:
        case "glorot_uniform":
            nn.init.xavier_uniform_(weight, parameters["gain"])
        case "glorot_normal":
            nn.init.xavier_normal_(weight, parameters["gain"])
        case "lecun_uniform":
            nn.init.uniform_(weight, -math.sqrt(3 / fan_in), math.sqrt(3 / fan_in))
        case "lecun_normal":
            nn.init.normal_(weight, std=math.sqrt(1 / fan_in))
        case "he_uniform":
            nn.init.uniform_(weight, -math.sqrt(6 / fan_in), math.sqrt(6 / fan_in))
        case "he_normal":
            nn.init.normal_(weight, std=math.sqrt(2 / fan_in))
        case "orthogonal":
            nn.init.orthogonal_(weight, parameters["gain"])
        case "uniform":
            nn.init.uniform_(weight, parameters["low"], parameters["high"])
        case "normal":
            nn.init.normal_(weight, parameters["mean"], parameters["std"])
        case "zeros":
            nn.init.zeros_(weight)
        case "ones":
            nn.init.ones_(weight)
        case "constant":
            nn.init.constant_(weight, parameters["value"])


def regularization(weight: Tensor, spec: Spec | None) -> Tensor:
    """The penalty l1 * sum|W| + l2 * sum W^2 of one weight, a scalar; 0 when ``spec`` is None."""
    if spec is None:
        return weight.new_zeros(())
    _, factors = _resolve("regularizer", spec, REGULARIZERS)
    loss = weight.new_zeros(())
    if l1 := factors.get("l1", 0.0):
        loss = loss + l1 * weight.abs().sum()
    if l2 := factors.get("l2", 0.0):
        loss = loss + l2 * weight.square().sum()
    return loss


def a_weight(module: nn.Module) -> Tensor:
    """A weight of a module, for the dtype and the device that it computes with; an empty tensor where it has none."""
    return next((weight for weight in module.parameters() if weight.is_floating_point()), torch.empty(0))
