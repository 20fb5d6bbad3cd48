"""The layers of a serialized Keras model, in the order in which they follow each other."""

from __future__ import annotations

from typing import Any

from ..errors import InputError

MODEL_CLASSES = ("Sequential", "Functional", "Model")


def refuse(what: str, reason: str) -> InputError:
    """The error for a part that cannot be converted."""
    return InputError(f"{what} cannot be converted: {reason}")


def class_name(layer: dict[str, Any]) -> str:
    """Class of a serialized layer without the package that it was registered under ("keras-lmu>LMU" -> "LMU")."""
    name = layer.get("class_name") if isinstance(layer, dict) else None
    if not isinstance(name, str):
        raise InputError(f"model_config: expected a layer with a class_name, found {str(layer)[:80]}")
    return name.rsplit(">", 1)[-1]


def config_of(layer: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a serialized layer."""
    config = layer.get("config")
    if not isinstance(config, dict):
        raise InputError(
            f"model_config: expected a mapping as config of {layer.get('class_name')!r}, found {str(config)[:80]}"
        )
    return config


def chain(model: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers in the order in which they follow each other."""
    kind, config = class_name(model), model.get("config")
    # Keras 2.0 and 2.1 wrote the layers of a Sequential model as the config itself.
    layers = config if isinstance(config, list) else config.get("layers") if isinstance(config, dict) else None
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise InputError(f"model_config: expected the layers of a model, found {str(config)[:80]}")
    if kind == "Sequential":
        return list(layers)
    if kind not in MODEL_CLASSES:
        raise refuse(f"a model of class {kind}", "expected a Sequential or functional model; its code is not in the file")
    following: dict[str, dict[str, Any]] = {}
    first: list[dict[str, Any]] = []
    for layer in layers:
        name = str(layer.get("name") or config_of(layer).get("name"))
        sources = _sources(layer.get("inbound_nodes") or [], name)
        if not sources:
            first.append(layer)
        elif len(sources) > 1 or sources[0] in following:
            raise refuse(
                f"layer {name!r} ({class_name(layer)})", "the model branches or joins; expected one chain of layers"
            )
        else:
            following[sources[0]] = layer
    if len(first) != 1:
        raise refuse("the model", f"expected one input, found {len(first)}")
    ordered = [first[0]]
    while (name := str(ordered[-1].get("name") or config_of(ordered[-1]).get("name"))) in following:
        ordered.append(following.pop(name))
    if following:
        raise InputError(f"model_config: layers {sorted(following)[:5]} do not hang together with the input")
    assert isinstance(config, dict)
    outputs = config.get("output_layers")
    if isinstance(outputs, list) and outputs and not isinstance(outputs[0], list):
        outputs = [outputs]
    if isinstance(outputs, list) and [str(output[0]) for output in outputs if output] != [name]:
        raise refuse("the model", f"expected its last layer {name!r} as the only output, found {outputs}")
    return ordered


def _sources(nodes: Any, name: str) -> list[str]:
    """Names of the layers whose outputs a layer was called on."""
    if len(nodes) > 1:
        raise refuse(f"layer {name!r}", "it is shared; expected one chain of layers")
    found: list[str] = []
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            history = node.get("keras_history")
            if isinstance(history, list) and history:
                found.append(str(history[0]))
            else:
                stack.extend(node.values())
        elif isinstance(node, list):
            # Keras 2: [layer, node, tensor, arguments]
            if len(node) >= 3 and isinstance(node[0], str) and all(isinstance(index, int) for index in node[1:3]):
                found.append(node[0])
                stack.extend(node[3:])
            else:
                stack.extend(node)
    return found
