"""Predictions for files: images for models of pixels, CSV or NPY tables for models of signals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .errors import InputError
from .model.modeling_heads import LMUForSequenceClassification
from .model.processing_lmu import LMUImageProcessor

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
SIGNALS = (".csv", ".npy")


@torch.inference_mode()
def predict(model: LMUForSequenceClassification, processor: Any, files: list[str]) -> list[dict[str, Any]]:
    """Classifies files.

    Args:
        model: a classifier.
        processor: its processor.
        files: images, or tables with one row per time step and one column per channel.

    Returns:
        Per file: ``file`` and ``probabilities``, label -> probability, most probable first (of each label by itself for a
        multi-label model); or for a regression model ``values``, target -> value.

    Raises:
        InputError: a file is missing, cannot be read, or does not fit the model.
    """
    # All files are read before any result is shown: one bad file must not leave half a table.
    sequences = [_read(Path(file), processor) for file in files]
    model.eval()
    names, problem = model.config.label_names, model.config.problem_type
    if problem is None and len(names) == 1:
        problem = "regression"
    results: list[dict[str, Any]] = []
    for file, sequence in zip(files, sequences, strict=True):
        values = torch.from_numpy(np.ascontiguousarray(sequence))[None].to(model.device)
        logits = model(input_values=values).logits.float()[0]
        if problem == "regression":
            results.append({"file": file, "values": dict(zip(names, logits.tolist(), strict=True))})
            continue
        probabilities = logits.sigmoid() if problem == "multi_label_classification" else logits.softmax(-1)
        order = probabilities.argsort(descending=True).tolist()
        results.append({"file": file, "probabilities": {names[i]: float(probabilities[i]) for i in order}})
    return results


def _read(path: Path, processor: Any) -> np.ndarray:
    if not path.is_file():
        raise InputError(f"file: no file {path}")
    wants_images = isinstance(processor, LMUImageProcessor)
    known = IMAGES if wants_images else SIGNALS
    if path.suffix.lower() not in known:
        kind = "images" if wants_images else "signals"
        raise InputError(f"file: this model takes {kind} ({', '.join(known)}), found {path.name}")
    try:
        return processor.sequence(_read_image(path) if wants_images else _read_table(path))
    except (ValueError, OSError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"file: {path.name}: {' '.join(str(error).split())}") from error


def _read_image(path: Path) -> Any:
    with Image.open(path) as image:
        image.load()
        return image


def _read_table(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".npy":
        array = np.load(path, allow_pickle=False)
        if array.dtype.kind not in "uif":
            raise ValueError(f"expected numbers, found an array of {array.dtype}")
        return array
    lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    # A header has no number in it: a line that has both is a row with a mistake.
    if lines and not any(_is_number(cell) for cell in lines[0].split(",")):
        lines = lines[1:]
    if not lines:
        raise ValueError("expected at least one row of numbers, found an empty file")
    return np.loadtxt(lines, delimiter=",", ndmin=2, comments=None)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
