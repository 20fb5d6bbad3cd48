"""Predictions for files: images for models of pixels, CSV or NPY tables for models of signals, .txt for models of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import InputError
from .model.modeling_series import LMUForTimeSeriesPrediction
from .model.processing_lmu import LMUImageProcessor

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
SIGNALS = (".csv", ".npy")
TEXTS = (".txt",)


@torch.inference_mode()
def predict(model: PreTrainedModel, processor: Any, files: list[str]) -> list[dict[str, Any]]:
    """Answers for files.

    Args:
        model: a classifier, or a model of values.
        processor: its processor.
        files: images, texts, or tables with one row per time step and one column per channel.

    Returns:
        Per file: ``file`` and ``probabilities``, label -> probability, most probable first (of each label by itself for a
        multi-label model); for a regression model ``values``, target -> value; for a model of series ``predictions``, target ->
        values, one per step where it predicts every step, in the unit of the file where it predicts its own input.

    Raises:
        InputError: a file is missing, cannot be read, or does not fit the model.
    """
    # All files are read before any result is shown: one bad file must not leave half a table.
    sequences = [_read(Path(file), processor) for file in files]
    model.eval()
    config: Any = model.config
    names, problem = config.label_names, config.problem_type
    if problem is None and len(names) == 1:
        problem = "regression"
    results: list[dict[str, Any]] = []
    for file, sequence in zip(files, sequences, strict=True):
        values = torch.from_numpy(np.ascontiguousarray(sequence))[None].to(model.device)
        outputs = model(**{"input_values" if config.vocab_size is None else "input_ids": values})
        if isinstance(model, LMUForTimeSeriesPrediction):
            results.append({"file": file, "predictions": _series(outputs.predictions.double()[0], config, processor)})
            continue
        logits = outputs.logits.float()[0]
        if problem == "regression":
            results.append({"file": file, "values": dict(zip(names, logits.tolist(), strict=True))})
            continue
        probabilities = logits.sigmoid() if problem == "multi_label_classification" else logits.softmax(-1)
        order = probabilities.argsort(descending=True).tolist()
        results.append({"file": file, "probabilities": {names[i]: float(probabilities[i]) for i in order}})
    return results


def _series(predictions: torch.Tensor, config: Any, processor: Any) -> dict[str, Any]:
    """Target -> its values, over time (and values ahead), of predictions (..., target_size)."""
    if config.target_size is None:
        # It answers as it reads: in the processor's scale.
        scale, shift = (torch.tensor(value, dtype=torch.float64) for value in (processor.std, processor.mean))
        predictions = predictions * scale + shift
    names = config.label_names
    size = predictions.shape[-1]
    names = names if len(names) == size else [str(index) for index in range(size)]
    return {name: predictions[..., index].tolist() for index, name in enumerate(names)}


def _read(path: Path, processor: Any) -> np.ndarray:
    if not path.is_file():
        raise InputError(f"file: no file {path}")
    wants_images, wants_text = isinstance(processor, LMUImageProcessor), isinstance(processor, PreTrainedTokenizerBase)
    known = IMAGES if wants_images else TEXTS if wants_text else SIGNALS
    if path.suffix.lower() not in known:
        kind = "images" if wants_images else "texts" if wants_text else "signals"
        raise InputError(f"file: this model takes {kind} ({', '.join(known)}), found {path.name}")
    try:
        if wants_text:
            return _read_text(path, processor)
        return processor.sequence(_read_image(path) if wants_images else _read_table(path))
    except (ValueError, OSError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"file: {path.name}: {' '.join(str(error).split())}") from error


def _read_image(path: Path) -> Any:
    with Image.open(path) as image:
        image.load()
        return image


def _read_text(path: Path, tokenizer: Any) -> np.ndarray:
    tokens = tokenizer(path.read_text(encoding="utf-8-sig"), verbose=False)["input_ids"]
    if not tokens:
        raise ValueError("expected a text of at least one token, found an empty one")
    return np.asarray(tokens, dtype=np.int64)


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
