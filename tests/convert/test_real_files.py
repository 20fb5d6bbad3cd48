"""Files of the real packages, where somebody made them: see tests/convert/make_keras_checkpoints.py. Otherwise skipped."""

import os
from pathlib import Path

import numpy as np
import pytest

from lmu_hf.convert import export, from_keras
from lmu_hf.errors import InputError

FOLDER = Path(os.environ.get("LMU_HF_KERAS_FILES", "/nonexistent"))
EXPORTS = os.environ.get("LMU_HF_KERAS_EXPORTS")
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
        try:
            conversion = from_keras(path, f"{stem}.json" if "weights" in ending else None)
        except InputError as error:
            assert "on every step has no counterpart" in str(error)  # noqa: PT017
            pytest.skip(str(error))
        np.testing.assert_allclose(conversion.predict(x), y, rtol=0, atol=tolerance, err_msg=ending)
        tried += 1
        if EXPORTS and ending == ".h5":
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
