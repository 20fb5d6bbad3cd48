"""Conversion as one call: a checkpoint of Keras in, a model or a folder out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..model.configuration_lmu import LMUConfig
from .architecture import Architecture, Head, parse
from .build import architecture_of, build_model
from .card import render
from .conversion import TOLERANCE, Conversion, verify
from .files import appearing, check_free
from .source import Source, open_source, read_json
from .weights import read_weights


def from_keras(source: Any, config: Any = None) -> Conversion:
    """Converts a Keras checkpoint.

    Args:
        source: path of a ``.keras``, ``.h5`` or ``.hdf5`` file, or a live Keras model.
        config: the architecture, for files that have weights alone: the JSON of ``model.to_json()`` or of a ``.keras`` file, or
            the fields of :class:`LMUConfig` (with ``num_labels`` for a model with a head); a path or the parsed mapping.

    Raises:
        InputError: the file is damaged or hostile, or the model has a part that cannot be converted; names it and the reason.
    """
    opened = open_source(source)
    try:
        architecture = _architecture(opened, config)
        try:
            weights = read_weights(architecture, opened)
            model = build_model(architecture, weights)
        except InputError:
            raise
        except ValueError as error:  # of LMUConfig and the layers, made for people
            raise InputError(f"{opened.name}: {error}") from error
    finally:
        opened.close()
    activation = architecture.head.activation if architecture.head is not None else "linear"
    return Conversion(model, activation, architecture.notes, opened.name, opened.keras_version, opened.sha256)


def _architecture(opened: Source, config: Any) -> Architecture:
    if config is None:
        if opened.config is None:
            raise InputError(
                f"{opened.name}: expected a whole model, found weights alone; give its architecture, the JSON of "
                "model.to_json() or the fields of LMUConfig, as config"
            )
        return _parsed(opened.config, opened)
    what = "config"
    if isinstance(config, str | Path):
        what = str(config)
        try:
            config = read_json(Path(config).read_bytes(), what)
        except OSError as error:
            raise InputError(f"{what}: {error.strerror or error}") from error
    if not isinstance(config, Mapping):
        raise InputError(f"{what}: expected a mapping, found {type(config).__name__}")
    if "class_name" in config:
        opened.keras_version = opened.keras_version or config.get("keras_version")
        return _parsed(dict(config), opened)
    with_head = bool({"num_labels", "id2label"} & set(config))
    try:
        ours = LMUConfig(**config)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: {' '.join(str(error).split())}") from error
    architecture = architecture_of(ours)
    if with_head:
        activation = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid"}
        architecture.head = Head("", len(ours.label_names), activation.get(ours.problem_type or "", "linear"))
    elif ours.return_sequences:
        architecture.pooling = None
    return architecture


def _parsed(config: dict[str, Any], opened: Source) -> Architecture:
    try:
        return parse(config, opened.loss, opened.keras_version)
    except InputError as error:
        raise InputError(f"{opened.name}: {error}") from error
    except (RecursionError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise InputError(
            f"{opened.name}: the configuration of the model is malformed: {type(error).__name__}: {error}"
        ) from error


def convert(
    source: str | Path, output_dir: str | Path, config: Any = None, data: Any = None, tolerance: float = TOLERANCE
) -> dict:
    """Converts a checkpoint into a folder for ``from_pretrained``.

    Args:
        source: the checkpoint.
        output_dir: the folder, which must not exist or be empty. It appears complete or not at all.
        config: the architecture, for weights alone; see :func:`from_keras`.
        data: inputs and outputs to verify with; see :func:`verify`. Without success nothing is written.
        tolerance: of the verification.

    Returns:
        ``notes``, ``model`` (the class), ``parameters``, ``difference`` (None if not verified).

    Raises:
        InputError: wrong input.
        VerificationError: the difference is larger than the tolerance.
    """
    output_dir = Path(output_dir)
    check_free(output_dir)
    conversion = from_keras(source, config)
    difference = None if data is None else verify(conversion, data, tolerance)
    with appearing(output_dir) as folder:
        conversion.model.save_pretrained(folder)
        (folder / "README.md").write_text(render(conversion, difference), encoding="utf-8")
    model = conversion.model
    return {
        "model": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "notes": conversion.notes,
        "difference": difference,
    }
