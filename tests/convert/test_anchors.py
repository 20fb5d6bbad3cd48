"""Four files of the real packages (make_keras_checkpoints.py); and that the files made for the other tests look alike."""

import io
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from keras_files import Made

from lmu_hf.convert import from_keras

GOLDEN = Path(__file__).parents[1] / "golden" / "keras_checkpoints.tar.xz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("keras")
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(path, filter="data")
    return path


@pytest.mark.parametrize(
    "name",
    [
        "lmu-0.1.0-keras2.12.0.zoh.h5",
        "keras_lmu-0.3.1-keras2.12.0.rnn_softmax.h5",
        "keras_lmu-0.9.0-keras2.15.0.zoh_theta.keras",
        "keras_lmu-0.9.0-keras3.15.1.stacked_cells.keras",
    ],
)
def test_outputs(folder, name):
    path = folder / name
    with np.load(path.with_suffix(".npz")) as data:
        # Float32 on both sides.
        np.testing.assert_allclose(from_keras(path).predict(data["x"]), data["y"], rtol=0, atol=1e-6)


def arrays(file, under):
    found = {}
    h5py.File(file, "r").visititems(lambda name, item: found.update({name: getattr(item, "shape", None)}))
    return {name.split(under, 1)[1]: shape for name, shape in found.items() if under in name and shape is not None}


def test_made_files_look_like_these(folder, tmp_path):
    real = arrays(folder / "lmu-0.1.0-keras2.12.0.zoh.h5", "model_weights/rnn/")
    assert real == arrays(Made("2019", units=5).h5(tmp_path / "2019.h5"), "model_weights/rnn/")

    real = arrays(folder / "keras_lmu-0.3.1-keras2.12.0.rnn_softmax.h5", "/lmu_cell/")
    made = Made("first", units=5, hidden_to_memory=True, memory_to_memory=True, input_to_hidden=True)
    assert {name: shape for name, shape in real.items() if "/m/" not in name} == arrays(
        made.h5(tmp_path / "a.h5"), "/lmu_cell/"
    )

    with zipfile.ZipFile(folder / "keras_lmu-0.9.0-keras3.15.1.stacked_cells.keras") as archive:
        real = arrays(io.BytesIO(archive.read("model.weights.h5")), "layers/rnn/")
    made = Made(cells=["SimpleRNN", "SimpleRNN", "GRU"])
    assert real.keys() == arrays(made.weights_h5(tmp_path / "b.weights.h5"), "layers/rnn/").keys()
