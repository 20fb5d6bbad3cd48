"""A converted model, and its comparison with the original."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import InputError
from ..model.modeling_lmu import LMUPreTrainedModel

# What float32 may cost at order 256 over 784 steps; a wrong conversion is off by far more.
TOLERANCE = 1e-3


@dataclass
class Conversion:
    """A converted model.

    Attributes:
        model: the model, in evaluation mode.
        activation: what the original applied to the head's output and the model leaves out: "linear", "softmax" or "sigmoid".
        notes: what was not carried over, or looks odd.
        source: name of the original.
        keras_version: of the library that wrote it, if known.
        sha256: of its file.
    """

    model: LMUPreTrainedModel
    activation: str
    notes: list[str]
    source: str
    keras_version: str | None = None
    sha256: str | None = None

    @torch.inference_mode()
    def predict(self, x: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """What the original computes for inputs (batch, time, features), or tokens (batch, time): its activation included."""
        outputs = []
        tokens = self.model.config.vocab_size is not None
        for rows in torch.from_numpy(np.ascontiguousarray(x)).split(batch_size):
            found = self.model(input_ids=rows.long()) if tokens else self.model(input_values=rows)
            if "logits" in found or "predictions" in found:
                y = found["logits" if "logits" in found else "predictions"]
            else:
                y = found.last_hidden_state if self.model.config.return_sequences else found.pooler_output
            outputs.append(
                {"softmax": lambda y: y.softmax(-1), "sigmoid": torch.sigmoid}.get(self.activation, lambda y: y)(y)
            )
        return torch.cat(outputs).numpy()


class VerificationError(ValueError):
    """The converted model computes something else than the original."""


def verify(conversion: Conversion, data: str | Path, tolerance: float = TOLERANCE) -> float:
    """Compares with outputs of the original.

    Args:
        conversion: the converted model.
        data: an ``.npz`` file with the inputs ``x`` (batch, time, features), or tokens (batch, time), and the original's
            outputs ``y``.
        tolerance: largest difference allowed.

    Returns:
        The largest absolute difference.

    Raises:
        InputError: the file is not such a file.
        VerificationError: the difference is larger.
    """
    try:
        with np.load(data, allow_pickle=False) as file:
            if not {"x", "y"} <= set(file.files):
                raise InputError(f"{data}: expected arrays x and y, found {file.files}")
            x, y = file["x"], file["y"]
    except InputError:
        raise
    except Exception as error:  # numpy raises many kinds for a file that is none of its own
        raise InputError(f"{data}: expected an .npz file of numbers with x and y: {str(error)[:100]}") from error
    if x.dtype.kind not in "fiu" or y.dtype.kind not in "fiu":
        raise InputError(f"{data}: expected numbers in x and y, found {x.dtype} and {y.dtype}")
    for name, array in (("x", x), ("y", y)):
        if not np.isfinite(array).all():
            raise InputError(f"{data}: {name}: expected finite numbers, found NaN or infinity")
    try:
        found = conversion.predict(x.astype(np.float64 if conversion.model.dtype == torch.float64 else np.float32))
    except (ValueError, IndexError) as error:
        raise InputError(f"{data}: x: {error}") from error
    if found.shape != y.shape:
        raise InputError(f"{data}: y: expected outputs of shape {found.shape} for these inputs, found {y.shape}")
    difference = float(np.abs(found - y.astype(np.float64)).max())
    if not difference <= tolerance:
        raise VerificationError(
            f"{data}: the outputs differ by up to {difference:.2e}, more than the tolerance {tolerance:g}"
        )
    return difference
