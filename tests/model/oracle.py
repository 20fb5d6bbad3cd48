"""Numbers of the reference implementation (keras-lmu 0.9.0, float64) and how its weights map onto ours."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmu_hf.model.layer import LMU

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.name.split(".")[1] for path in GOLDEN.glob("keras_lmu.*.npz"))
_CELLS = {
    "SimpleRNN": "rnn",
    "SimpleRNNCell": "rnn",
    "LSTM": "lstm",
    "LSTMCell": "lstm",
    "GRU": "gru",
    "GRUCell": "gru",
    "Dense": "dense",
}


class Oracle:
    """One configuration: its arrays and the equivalent layer."""

    def __init__(self, name: str):
        with np.load(GOLDEN / f"keras_lmu.{name}.npz") as file:
            values, index = file["values"], json.loads(file["index"].tobytes().decode())
        self.config: dict[str, Any] = index["config"]
        self.arrays = {
            key: torch.from_numpy(values[offset : offset + math.prod(shape)].reshape(shape).copy())
            for key, (offset, shape) in index["arrays"].items()
        }

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.arrays[key]

    @property
    def states(self) -> list[torch.Tensor]:
        return [self.arrays[key] for key in sorted(self.arrays) if key.startswith("state")]

    def build(self, dtype: torch.dtype, **kwargs: Any) -> LMU:
        """The layer with the oracle's weights, returning sequences and states."""
        options = dict(self.config["layer"])
        theta, has_kernel = options.pop("theta"), options.pop("kernel_initializer", "glorot_uniform") is not None
        cells = [
            {
                "name": _CELLS[kind],
                "hidden_size": keras["units"],
                "activation": keras.get("activation", "linear" if kind == "Dense" else "tanh"),
                "use_bias": keras.get("use_bias", True),
            }
            for kind, keras in self.config["hidden"]
        ]
        known = ("hidden_to_memory", "memory_to_memory", "input_to_hidden", "trainable_theta", "discretizer", "use_bias")
        layer = LMU(
            self["x"].shape[-1],
            options["memory_d"],
            options["order"],
            theta,
            cells or None,
            kernel_initializer="glorot_uniform" if has_kernel else None,
            return_sequences=True,
            return_state=True,
            dtype=dtype,
            **{key: options[key] for key in known if options.get(key) is not None},
            **kwargs,
        )
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                parameter.copy_(self.ours("w", name))
        return layer

    def ours(self, kind: str, name: str) -> torch.Tensor:
        """The value ("w") or gradient ("grad.w") that the oracle has for one of our parameters."""
        own = name.removeprefix("cell.")
        if not own.startswith("hidden_cell."):
            return self[f"{kind}.lmu.{own}"]
        parts = own.split(".")
        cell = "hidden" if len(parts) == 2 else f"hidden{parts[2]}"
        gru = any(c[0].startswith("GRU") for c in self.config["hidden"])
        keras = {"weight_ih": "kernel", "weight_hh": "recurrent_kernel", "bias": "bias", "bias_hh": "bias"}[parts[-1]]
        value = self[f"{kind}.{cell}.{keras}"]
        if keras != "bias":
            value = value.mT
        elif gru:
            value = value[1 if parts[-1] == "bias_hh" else 0]
        if gru:  # the reference orders the gates z, r, n, ours are r, z, n
            z, r, n = value.chunk(3, dim=0)
            value = torch.cat([r, z, n])
        return value
