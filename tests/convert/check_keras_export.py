"""Load what `lmu-hf convert --to keras` wrote with the real keras-lmu, and compare its outputs.

    python check_keras_export.py FOLDER     # in an environment with keras-lmu==0.9.0, Keras 3 and tensorflow-cpu

For every `NAME.keras` in FOLDER there is a `NAME.npz` with inputs x and the outputs y of the model of this project, as
`tests/convert/test_real_files.py` leaves them when LMU_HF_KERAS_EXPORTS names a folder. Where there is a `NAME.weights.h5` it is
loaded into the same model, its weights having been set to zero before.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_lmu  # which registers its layers
import numpy as np

# Float32 arithmetic in another order. At order 256 its matrices come from a float32 exponential, and 784 steps add up.
TOLERANCE, AT_ORDER_256 = 2e-6, 1e-3


def main(folder):
    failed = False
    for path in sorted(folder.glob("*.keras")):
        model = keras.models.load_model(path)
        with np.load(path.with_suffix(".npz")) as data:
            x, y = data["x"], data["y"]
        differences = [float(np.abs(model.predict(x, verbose=0) - y).max())]
        alone = path.with_suffix(".weights.h5")
        if alone.exists():
            model.set_weights([np.zeros_like(weight) for weight in model.get_weights()])
            model.load_weights(alone)
            differences.append(float(np.abs(model.predict(x, verbose=0) - y).max()))
        failed |= not max(differences) <= (AT_ORDER_256 if "psmnist" in path.name else TOLERANCE)
        print(f"{path.stem:60} {' '.join(f'{value:.1e}' for value in differences)}")
    print("failed" if failed else "as it should be", f"(keras {keras.__version__}, keras-lmu {keras_lmu.__version__})")
    sys.exit(failed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
