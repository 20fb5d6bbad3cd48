"""Files of the real packages, where somebody made them: see tests/convert/make_keras_checkpoints.py. Otherwise skipped."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from lmu_hf.convert import export, from_keras

FOLDER = Path(os.environ.get("LMU_HF_KERAS_FILES", "/nonexistent"))
EXPORTS = os.environ.get("LMU_HF_KERAS_EXPORTS")
# What keras-lmu 0.9 under Keras 3 has no counterpart of, or what export does not write.
ONE_WAY = {"bidirectional", "bidirectional_steps", "backwards", "tokens", "lstm_hard"}
STEMS = sorted(path.with_suffix("") for path in FOLDER.glob("*.npz"))


@pytest.mark.parametrize("stem", STEMS or [None], ids=lambda stem: stem.name if stem else "none")
def test_outputs_are_those_of_the_original(stem):
    if stem is None:
        pytest.skip("LMU_HF_KERAS_FILES names no folder of files made by the real packages")
    with np.load(f"{stem}.npz") as data:
        x, y = data["x"], data["y"]
    # Up to order 64 float32 is all that differs. At 256 the original's FFT and float32 matrix exponential cost more.
    tolerance = 1e-3 if "psmnist" in stem.name else 1e-5
    tried = 0
    for ending in (".keras", ".h5", ".weights.h5", "_weights.h5"):
        path = Path(f"{stem}{ending}")
        if not path.exists():
            continue
        config = json.loads(Path(f"{stem}.json").read_text())
        # Keras 3 leaves its version out there.
        config.setdefault("keras_version", stem.name.partition("-keras")[2].rsplit(".", 1)[0])
        conversion = from_keras(path, config if "weights" in ending else None)
        np.testing.assert_allclose(conversion.predict(x), y, rtol=0, atol=tolerance, err_msg=ending)
        tried += 1
        if EXPORTS and ending == ".h5" and stem.name.rsplit(".", 1)[1] not in ONE_WAY:
            Path(EXPORTS).mkdir(parents=True, exist_ok=True)
            back = Path(EXPORTS) / stem.name
            export(conversion.model, f"{back}.keras")
            export(conversion.model, f"{back}.weights.h5")
            np.savez_compressed(f"{back}.npz", x=x, y=_of_head(conversion, x))
    assert tried >= 3


def _of_head(conversion, x):
    """The outputs of the exported model, whose activation is that of its problem type."""
    problem = getattr(conversion.model.config, "problem_type", None)
    if hasattr(conversion.model, "score"):
        conversion.activation = {"single_label_classification": "softmax", "multi_label_classification": "sigmoid"}.get(
            problem, "linear"
        )
    return conversion.predict(x)
