"""What a model is, in words: the part of a card that its configuration and its files tell."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple


class Kind(NamedTuple):
    """What a model is for.

    Attributes:
        name: "image", "signal" or "text" for a classifier of these, "steps", "language", "series" or "features".
        auto: the Auto class to load it with.
        pipeline: its task on the Hub; None where the Hub has none.
        task: the same for the scores of the card.
    """

    name: str
    auto: str
    pipeline: str | None
    task: str


_IMAGE = Kind("image", "AutoModelForImageClassification", "image-classification", "image-classification")
_SIGNAL = Kind("signal", "AutoModelForSequenceClassification", None, "time-series-classification")
_TEXT = Kind("text", "AutoModelForSequenceClassification", "text-classification", "text-classification")
_STEPS = Kind("steps", "AutoModelForTokenClassification", "token-classification", "token-classification")
_LANGUAGE = Kind("language", "AutoModelForCausalLM", "text-generation", "text-generation")
_SERIES = Kind("series", "AutoModelForTimeSeriesPrediction", "time-series-forecasting", "time-series-forecasting")
_FEATURES = Kind("features", "AutoModel", "feature-extraction", "other")


def kind_of(config: dict[str, Any], processor: dict[str, Any]) -> Kind:
    """The kind of a model, from the content of ``config.json`` and, if there is one, of ``preprocessor_config.json``."""
    (name,) = config.get("architectures") or ["LMUModel"]
    if name == "LMUForSequenceClassification":
        if "image_processor_type" in processor:
            return _IMAGE
        return _TEXT if config.get("vocab_size") else _SIGNAL
    heads = {
        "LMUForTokenClassification": _STEPS,
        "LMUForCausalLM": _LANGUAGE,
        "LMUForTimeSeriesPrediction": _SERIES,
    }
    return heads.get(name, _FEATURES)


def label_names(config: dict[str, Any]) -> list[str]:
    """Names of the classes, in the order of the logits."""
    # transformers leaves out what is its default.
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return [str(names[key]) for key in sorted(names, key=int)]


def is_regression(config: dict[str, Any]) -> bool:
    """Whether a model of whole sequences computes values rather than sorting into classes."""
    return config.get("problem_type") == "regression"


def score_name(metric: str, config: dict[str, Any], kind: Kind) -> str:
    """The name of a score, with its unit where it has one."""
    return loss_name(config, kind) if metric == "loss" else {"nrmse": "NRMSE", "mse": "MSE"}.get(metric, metric)


def loss_name(config: dict[str, Any], kind: Kind) -> str:
    """What the loss of a model is, with its unit where it has one."""
    if kind.name == "features":
        return "loss"
    if kind.name == "series":
        return "loss (Huber)" if config.get("prediction_loss") == "huber" else "loss (mean squared error)"
    if kind.name in ("image", "signal", "text") and is_regression(config):
        return "loss (mean squared error)"
    return "loss (cross-entropy, nats)"


def summary(result: dict[str, Any], config: dict[str, Any], processor: dict[str, Any], kind: Kind) -> str:
    """What the model does and how, in a paragraph."""
    series = "pixels" if kind.name == "image" else "text" if config.get("vocab_size") else "series"
    return (
        f"This model {_does(config, processor, kind)}. It goes through the {series} step by step and keeps what it has read in a "
        "Legendre Memory Unit (LMU): a sliding window of the past, held as coefficients of Legendre polynomials, updated by one "
        f"fixed matrix.{_tuned(result)}"
    )


def _tuned(result: dict[str, Any]) -> str:
    base, source = result.get("base_model"), result.get("fine_tuned_from", {})
    head = {"new": ", with a new head", "taken over": ", with its head"}.get(source.get("head", ""), "")
    if base:
        return f" It is a fine-tuned [{base}](https://huggingface.co/{base}){head}."
    return f" It is fine-tuned from the checkpoint {source['name']}{head}, which is not published with it." if source else ""


def _does(config: dict[str, Any], processor: dict[str, Any], kind: Kind) -> str:
    if kind.name == "image":
        thing = f"an image of {processor['size']['height']} x {processor['size']['width']} pixels"
    else:
        thing = "a text" if config.get("vocab_size") else "a time series"
    if kind.name == "language":
        return "predicts the next token of a text, and so writes on"
    if kind.name == "series" and config.get("target_size") is not None:
        when = "at every step" if config["return_sequences"] else "at its end"
        return f"reads {thing} and computes {count(config['target_size'], 'value')} {when}"
    if kind.name == "series":
        return f"predicts {_ahead(config)} of {thing}"
    if kind.name == "features":
        return f"turns {thing} into a vector per step and one for the whole, for another model to build on"
    labels = label_names(config)
    listed = f"({', '.join(labels[:12])}{', ...' if len(labels) > 12 else ''})"
    if kind.name == "steps":
        each = "token" if config.get("vocab_size") else "step"
        return f"gives each {each} of {thing} one of {len(labels)} labels {listed}"
    if is_regression(config):
        return f"computes {count(len(labels), 'value')} from {thing}"
    if config.get("problem_type") == "multi_label_classification":
        return f"tells which of {len(labels)} labels {listed} fit {thing}"
    return f"sorts {thing} into one of {len(labels)} classes {listed}"


def _ahead(config: dict[str, Any]) -> str:
    first, number = config["horizon"], config["prediction_length"]
    if first == 1:
        return "the next value" if number == 1 else f"the next {number} values"
    return f"the value {first} steps ahead" if number == 1 else f"the values {first} to {first + number - 1} steps ahead"


def overview(
    result: dict[str, Any], config: dict[str, Any], processor: dict[str, Any], files: dict[str, Path]
) -> list[tuple[str, str]]:
    """The model in figures: name and value of each."""
    rows = []
    if "image_processor_type" in processor:
        pixels = processor["size"]["height"] * processor["size"]["width"]
        value = "one grey value" if processor["image_mode"] == "L" else "red, green and blue"
        order = "in a fixed random order, stored with the processor" if processor.get("permutation") else "row by row"
        rows.append(("Input", f"{pixels:,} steps, {value} per step, {order}"))
    elif "feature_extractor_type" in processor:
        rate = processor["sampling_rate"]
        sampled = f", {rate:,} samples per second" if rate > 1 else ""
        rows.append(("Input", f"any number of steps, {count(processor['feature_size'], 'channel')} per step{sampled}"))
    elif config.get("vocab_size"):
        rows.append(("Input", f"tokens, a vocabulary of {config['vocab_size']:,}"))
    else:
        rows.append(("Input", f"any number of steps, {count(config['input_size'], 'value')} per step"))
    layers = config["num_hidden_layers"]
    block = " in residual blocks" if config["block_type"] == "residual" else ""
    rows.append(("Layers", f"{layers}{block}" + (", bidirectional" if config["bidirectional"] else "")))
    theta = config["theta"]
    window = f"{theta:g} steps" if isinstance(theta, int | float) else f"{json.dumps(theta)} steps"
    trained = ", trained" if config["trainable_theta"] else ""
    coupled = ", fed back into itself" if config["hidden_to_memory"] or config["memory_to_memory"] else ""
    dimensions = count(config["memory_d"], "dimension")
    rows.append(("Memory", f"{dimensions} of order {config['order']:,}, window of {window}{trained}{coupled}"))
    cell = config["hidden_cell"]
    if cell is None:
        hidden = "none: the memory is the output"
    elif isinstance(cell, str):
        act = f", {config['hidden_act']}" if config["hidden_act"] else ""
        hidden = cell if cell == "readout" else f"{cell}, {config['hidden_size']:,} units{act}"
    else:
        hidden = f"`{json.dumps(cell)}`"
    rows.append(("Hidden cell", hidden))
    total, trainable = _parameters(result, files)
    rows.append(("Parameters", f"{total:,}" + ("" if trainable == total else f", {trainable:,} of them trained")))
    return rows


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _parameters(result: dict[str, Any], files: dict[str, Path]) -> tuple[int, int]:
    if "parameters" in result:
        return result["parameters"]["total"], result["parameters"]["trainable"]
    from safetensors import safe_open

    total = 0
    for name, path in files.items():
        if name.endswith(".safetensors"):
            with safe_open(path, "pt") as weights:
                total += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    return total, total
