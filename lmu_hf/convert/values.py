"""Values in the configurations that Keras writes: checked, and refused by name where they mean nothing here."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from .graph import class_name, config_of, refuse
from .source import snake_case

MAX_ORDER = 4096  # its state matrix has 134 MB in float64, and takes minutes to exponentiate

ACTIVATIONS = {
    **{name: name for name in ("linear", "tanh", "relu", "sigmoid", "gelu", "silu", "elu", "selu", "softplus", "softsign")},
    "swish": "silu",
    "hard_sigmoid": "hard_sigmoid",
}


def activation_name(value: Any, what: str) -> str:
    """Name of an activation, however Keras serialized it."""
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


def read_activation(value: Any, what: str, keras2: bool | None) -> str:
    """Our name of an activation."""
    name = activation_name(value, what)
    if name == "hard_sigmoid":
        if keras2 is None:
            raise refuse(
                what, "hard_sigmoid of Keras 2 and of Keras 3 differ, and no keras_version says which; add it to the config"
            )
        return "hard_sigmoid_keras2" if keras2 else name
    if name not in ACTIVATIONS:
        raise refuse(what, f"expected one of {sorted(ACTIVATIONS)}, found {name!r}")
    return ACTIVATIONS[name]


def read_regularizer(value: Any, what: str) -> dict[str, Any]:
    """A regularizer as LMUConfig has it."""
    name = class_name(value).lower() if isinstance(value, dict) else str(value).lower()
    factors = config_of(value) if isinstance(value, dict) else {}
    used = {key: float(read_number(factors, key, what)) for key in ("l1", "l2") if factors.get(key)}
    if name not in ("l1", "l2", "l1l2", "l1_l2"):
        raise refuse(what, f"expected L1, L2 or L1L2, found {name!r}")
    return {"name": "l1_l2" if name in ("l1l2", "l1_l2") else name, **used}


def read_discretizer(value: Any, what: str) -> str:
    """ "zoh" or "euler"."""
    if value not in ("zoh", "euler"):
        raise refuse(what, f"expected discretizer zoh or euler, found {value!r}")
    return value


def read_order(order: int, what: str) -> int:
    """An order that can be computed with."""
    if order > MAX_ORDER:
        raise refuse(what, f"expected order <= {MAX_ORDER}, found {order:,}")
    return order


def read_count(config: dict[str, Any], key: str, what: str) -> int:
    """A positive whole number of a configuration."""
    value = config.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 24:
        raise InputError(f"{what}: {key}: expected a whole number from 1 to {1 << 24:,}, found {value!r}")
    return value


def read_number(config: dict[str, Any], key: str, what: str) -> float:
    """A number of a configuration."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise InputError(f"{what}: {key}: expected a number >= 0, below 1e12, found {value!r}")
    return value


def read_flag(config: dict[str, Any], key: str, default: bool) -> bool:
    """A boolean of a configuration."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise InputError(f"model_config: {key}: expected true or false, found {value!r}")
    return value
