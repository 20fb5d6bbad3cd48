"""Conversion as one call: a checkpoint of Keras in, a model or a folder out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..model.configuration_lmu import LMUConfig
from .architecture import Architecture, Head, parse
from .build import ACTIVATION_OF, architecture_of, build_model
from .card import render
from .conversion import TOLERANCE, Conversion, VerificationError, verify
from .deduction import deduce
from .files import appearing, check_free
from .source import Source, open_source, read_json
from .weights import read_weights


def from_keras(source: Any, config: Any = None) -> Conversion:
    """Converts a Keras checkpoint.

    Args:
        source: path of a ``.keras``, ``.h5`` or ``.hdf5`` file, or a live Keras model.
        config: the architecture, for files that have weights alone: the JSON of ``model.to_json()`` or of a ``.keras`` file, or
            those fields of :class:`LMUConfig` that the weights do not tell; a path, the JSON itself or the parsed mapping.

    Raises:
        InputError: the file is damaged or hostile, or the model has a part that cannot be converted; names it and the reason.
    """
    opened = open_source(source)
    try:
        architecture = _architecture(opened, config)
        try:
            weights = read_weights(architecture, opened)
            model = build_model(architecture, weights)
        except ValueError as error:  # of LMUConfig and the layers too, made for people
            where = "" if str(error).startswith(opened.name) else f"{opened.name}: "
            raise InputError(f"{where}{error}") from error
    finally:
        opened.close()
    activation = architecture.head.activation if architecture.head is not None else "linear"
    return Conversion(model, activation, architecture.notes, opened.name, opened.keras_version, opened.sha256)


def _architecture(opened: Source, config: Any) -> Architecture:
    if config is None:
        if opened.config is not None:
            return _parsed(opened.config, opened)
        try:
            return _of_fields(*deduce(opened, {}), "its weights")
        except InputError as error:
            raise InputError(
                f"{opened.name}: expected a whole model, found weights alone, and these do not tell the architecture ({error}); "
                "give it as config, the JSON of model.to_json() or fields of LMUConfig"
            ) from error
    what = "config"
    if isinstance(config, str | Path):
        inline = isinstance(config, str) and config.lstrip().startswith("{")
        what = what if inline else str(config)
        try:
            config = read_json(str(config) if inline else Path(config).read_bytes(), what)
        except OSError as error:
            raise InputError(f"{what}: {error.strerror or error}") from error
    if not isinstance(config, Mapping):
        raise InputError(f"{what}: expected a mapping, found {type(config).__name__}")
    if "class_name" in config:
        opened.keras_version = opened.keras_version or config.get("keras_version")
        return _parsed(dict(config), opened)
    try:
        fields, notes = deduce(opened, config)
    except InputError as error:
        architecture = _of_fields(dict(config), [], what)
        # LMUConfig has defaults for these too, but nothing in the weights would show that they are wrong.
        if missing := [name for name in ("input_size", "order", "theta") if name not in config]:
            raise InputError(
                f"{what}: expected {', '.join(missing)} too, which these weights do not tell ({error})"
            ) from error
        return architecture
    return _of_fields(fields, notes, what)


def _of_fields(fields: dict[str, Any], notes: list[str], what: str) -> Architecture:
    """The architecture that fields of LMUConfig describe, with a head if the number of labels is among them."""
    try:
        ours = LMUConfig(**fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: {' '.join(str(error).split())}") from error
    architecture = architecture_of(ours)
    architecture.notes += notes
    if {"num_labels", "id2label"} & set(fields):
        activation = ACTIVATION_OF.get(ours.problem_type or "", "linear")
        # Whether it has a bias, the weights tell.
        architecture.head = Head("", len(ours.label_names), activation, use_bias=None)
    elif ours.return_sequences and "return_sequences" in fields:
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
    try:
        difference = None if data is None else verify(conversion, data, tolerance)
    except VerificationError as error:
        raise VerificationError("; ".join([str(error), *conversion.notes])) from error
    with appearing(output_dir) as folder:
        conversion.model.save_pretrained(folder)
        (folder / "README.md").write_text(render(conversion, difference), encoding="utf-8")
    model = conversion.model
    return {
        "model": type(model).__name__,
        "parameters": model.num_parameters(),
        "notes": conversion.notes,
        "difference": difference,
    }
