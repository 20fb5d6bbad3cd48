"""What cannot be converted, is damaged or hostile: one clear error each, and nothing written."""

import json
import struct
import zipfile

import h5py
import numpy as np
import pytest
from keras_files import Made

from lmu_hf.convert import VerificationError, convert, from_keras
from lmu_hf.errors import InputError

LMU, DENSE = 1, 2  # places of the layers in Made's model


def changed(made, place=LMU, in_cell=False, **values):
    """Made's configuration with other values in one layer, or in its cell."""
    config = made.config()
    layer = config["config"]["layers"][place]["config"]
    (layer["cell"]["config"] if in_cell else layer).update(values)
    return config


def with_layer(made, place, kind, **values):
    config = made.config()
    config["config"]["layers"].insert(place, {"class_name": kind, "config": {"name": "extra", **values}})
    return config


CELL = {"name": "gru_cell", "units": 4, "activation": "tanh", "recurrent_activation": "sigmoid", "use_bias": True}
PARTS = {
    "Lambda before": (lambda m: with_layer(m, 1, "Lambda", function="evil"), "'extra' (Lambda).*code, which is never run"),
    "Lambda behind": (lambda m: with_layer(m, 3, "Lambda", function="evil"), "Lambda.*never run"),
    "custom layer": (lambda m: with_layer(m, 2, "Company>Attention"), "'extra' (Attention).*no counterpart"),
    "custom cell": (
        lambda m: changed(m, cell={"class_name": "MyLMUCell", "config": {}}),
        "cell MyLMUCell.*expected an LMUCell",
    ),
    "LMUCellODE": (lambda m: changed(m, cell={"class_name": "LMUCellODE", "config": {}}), "trained or integrated otherwise"),
    "LSTM layer": (lambda m: with_layer(m, 1, "LSTM", units=3), "before the first LMU"),
    "batch norm": (lambda m: with_layer(m, 2, "BatchNormalization"), "BatchNormalization.*no counterpart"),
    "masking": (lambda m: with_layer(m, 1, "Masking"), "attention_mask"),
    "two dense": (lambda m: with_layer(m, 2, "Dense", units=4, activation="relu"), "one dense layer"),
    "relu head": (lambda m: changed(m, DENSE, activation="relu"), "linear, softmax or sigmoid"),
    "custom activation": (
        lambda m: changed(m, DENSE, activation={"class_name": "function", "module": "evil", "config": "softmax"}),
        "name of an activation",
    ),
    "go_backwards": (
        lambda m: changed(m, go_backwards=True, return_sequences=True),
        "go_backwards=True with return_sequences=True",
    ),
    "stateful": (lambda m: changed(m, stateful=True), "stateful=True"),
    "time_major": (lambda m: changed(m, time_major=True), "time_major=True"),
    "regularizer": (
        lambda m: changed(m, in_cell=True, kernel_regularizer={"class_name": "L2", "config": {"l2": "x"}}),
        "kernel_regularizer: l2: expected a number",
    ),
    "discretizer": (lambda m: changed(m, in_cell=True, discretizer="tustin"), "zoh or euler, found 'tustin'"),
    "theta": (lambda m: changed(m, in_cell=True, theta=-9.0), "theta"),
    "order 0": (lambda m: changed(m, in_cell=True, order=0), "order: expected a whole number"),
    "order of a bomb": (lambda m: changed(m, in_cell=True, order=1_000_000), "order <= 4096, found 1,000,000"),
    "units of a bomb": (lambda m: changed(m, DENSE, units=10**12), "units: expected a whole number"),
    "other units": (lambda m: changed(m, DENSE, units=5), "dense_9/kernel: expected shape (4, 5), found (4, 3)"),
    "leaky_relu": (
        lambda m: changed(
            m, in_cell=True, hidden_cell={"class_name": "LSTMCell", "config": {**CELL, "activation": "leaky_relu"}}
        ),
        "found 'leaky_relu'",
    ),
    "subclass": (lambda m: {"class_name": "MyModel", "config": {}}, "class MyModel|layers of a model"),
    "no LMU": (
        lambda m: {"class_name": "Sequential", "config": {"layers": [m.config()["config"]["layers"][0]]}},
        "at least one LMU",
    ),
    "no mapping": (
        lambda m: {"class_name": "Sequential", "config": {"layers": [{"class_name": "RNN"}]}},
        "mapping as config",
    ),
    "bias that is not there": (lambda m: changed(m, in_cell=True, use_bias=True), "expected a weight bias of shape (2,)"),
    "weight too many": (lambda m: changed(m, in_cell=True, memory_to_memory=False), "no place for.*recurrent_kernel"),
    "other input": (lambda m: changed(m, 0, batch_input_shape=[None, None, 7]), "expected shape (11, 2), found (7, 2)"),
}


@pytest.mark.parametrize("name", PARTS)
def test_part_without_a_counterpart(tmp_path, name):
    make, message = PARTS[name]
    made = Made("first", hidden_to_memory=True, memory_to_memory=True)
    path = made.h5(tmp_path / "model.h5", config=make(made))
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(InputError, match=pattern):
        convert(path, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.h5"]


@pytest.mark.parametrize("generation", ["2019", "first"])
@pytest.mark.parametrize(
    "harm",
    [
        lambda a: a + 1e-3 * np.sign(np.random.default_rng(0).normal(size=a.shape)),  # one step of Adam
        lambda a: a.T,
        lambda a: -a,
        lambda a: np.random.default_rng(0).normal(size=a.shape),
    ],
)
def test_matrices_of_another_system(tmp_path, generation, harm):
    made = Made(generation, order=24, theta=50.0)
    layers = made.named()
    name = "rnn/lmu_cell/AT:0" if generation == "2019" else "rnn/lmu_cell/A:0"
    layers["rnn"][name] = harm(layers["rnn"][name]).astype(np.float32)
    with pytest.raises(InputError, match="differ from the Legendre system of order 24"):
        from_keras(made.h5(tmp_path / "model.h5", layers=layers))


def test_matrices_of_another_theta(tmp_path):
    made = Made("2019", units=2, order=256, theta=783.0, inputs=1)
    config = changed(made, in_cell=True, theta=784.0)
    with pytest.raises(InputError, match="differ from the Legendre system of order 256, theta 784, zoh"):
        from_keras(made.h5(tmp_path / "model.h5", config=config))


def test_matrices_of_float32_arithmetic(tmp_path):
    """Rounding that hits few entries hard is accepted, and said."""
    made = Made("first", order=256, theta=784.0, memory_d=1)
    layers = made.named()
    a = layers["rnn"]["rnn/lmu_cell/A:0"].copy()
    rng = np.random.default_rng(0)
    a[rng.integers(256, size=20), rng.integers(256, size=20)] += 5e-4
    layers["rnn"]["rnn/lmu_cell/A:0"] = a
    conversion = from_keras(made.h5(tmp_path / "model.h5", layers=layers))
    assert any("as float32 computation makes them" in note for note in conversion.notes)


def test_hard_sigmoid_of_an_unknown_version(tmp_path):
    made = Made("first", cells=["LSTM"], hard_sigmoid=True)
    path = made.h5(tmp_path / "weights.h5", config=None)
    with pytest.raises(InputError, match="hard_sigmoid of Keras 2 and of Keras 3 differ"):
        from_keras(path, made.config())
    for version, name in (("2.3.1", "hard_sigmoid_keras2"), ("3.0.0", "hard_sigmoid")):
        found = from_keras(path, {**made.config(), "keras_version": version}).model.config.hidden_cell
        assert found == {"name": "lstm", "recurrent_activation": name}


def test_branches(tmp_path):
    made = Made()
    layers = made.config()["config"]["layers"]
    names = [layer["config"]["name"] for layer in layers]

    def functional(sources):
        nodes = [[[[source, 0, 0, {}] for source in wanted]] if wanted else [] for wanted in sources]
        parts = [{**layer, "name": name, "inbound_nodes": n} for layer, name, n in zip(layers, names, nodes, strict=True)]
        return {
            "class_name": "Functional",
            "config": {"name": "model", "layers": parts, "output_layers": [["dense_9", 0, 0]]},
        }

    path = made.h5(tmp_path / "chain.h5", config=functional([[], ["input_1"], ["rnn"]]))
    np.testing.assert_allclose(from_keras(path).predict(made.x()), made(made.x()), rtol=0, atol=1e-6)
    for sources, message in (
        ([[], ["input_1"], ["rnn", "input_1"]], "branches or joins"),
        ([[], ["input_1"], ["input_1"]], "branches or joins"),
        ([[], [], ["rnn"]], "expected one input, found 2"),
    ):
        with pytest.raises(InputError, match=message):
            from_keras(made.h5(tmp_path / "model.h5", config=functional(sources)))


# ---------------------------------------------------------------- damaged and hostile files


def bomb(path):
    with h5py.File(path, "r+") as file:
        group = file["model_weights/rnn/rnn/lmu_cell"]
        del group["kernel:0"]
        group.create_dataset("kernel:0", (1 << 34, 2), "f4", chunks=(1 << 16, 2), compression="gzip")


def zeros_bomb(path):
    """The right shape for the configuration, stored in next to nothing."""
    with h5py.File(path, "r+") as file:
        del file["model_weights/dense_9/dense_9/kernel:0"]
        rows = 1 << 20
        file["model_weights/dense_9/dense_9"].create_dataset(
            "kernel:0", (4, rows), "f4", chunks=(4, rows), compression="gzip"
        )
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"][DENSE]["config"]["units"] = rows
        file.attrs["model_config"] = json.dumps(config)


def external_link(path):
    with h5py.File(path, "r+") as file:
        del file["model_weights/rnn/rnn"]
        file["model_weights/rnn/rnn"] = h5py.ExternalLink("other.h5", "/")


def external_storage(path):
    (path.parent / "raw").write_bytes(bytes(4 * 8 * 3))
    with h5py.File(path, "r+") as file:
        group = file["model_weights/dense_9/dense_9"]
        del group["kernel:0"]
        group.create_dataset("kernel:0", (4, 3), "f4", external=[(str(path.parent / "raw"), 0, 48)])


def strings(path):
    with h5py.File(path, "r+") as file:
        group = file["model_weights/dense_9/dense_9"]
        del group["bias:0"]
        group["bias:0"] = ["evil", "evil", "evil"]


def nan(path):
    with h5py.File(path, "r+") as file:
        file["model_weights/dense_9/dense_9/bias:0"][1] = np.nan


def twice(path):
    """Thousands of layers in a few bytes."""
    with h5py.File(path, "r+") as file:
        file["model_weights"].attrs["layer_names"] = ["rnn"] * 3000


def missing(path):
    with h5py.File(path, "r+") as file:
        del file["model_weights/rnn/rnn/lmu_cell/kernel:0"]


def group_for_array(path):
    with h5py.File(path, "r+") as file:
        del file["model_weights/rnn/rnn/lmu_cell/kernel:0"]
        file.create_group("model_weights/rnn/rnn/lmu_cell/kernel:0")


def bad_json(path):
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = "{not json"


def deep_json(path):
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = "[" * 100_000


def bad_text(path):
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = np.bytes_(b"\xff\xfe{")


def cut(path):
    path.write_bytes(path.read_bytes()[:9000])


def no_hdf5(path):
    path.write_bytes(b"<html>404</html>")


def empty(path):
    path.write_bytes(b"")


DAMAGES = {
    bomb: "expected shape|no checkpoint",
    zeros_bomb: "that is no checkpoint",
    external_link: "is a link",
    external_storage: "outside of the file",
    strings: "floating point",
    nan: "finite",
    missing: "has no such weights",
    twice: "listed twice",
    group_for_array: "found a group",
    bad_json: "expected JSON",
    deep_json: "expected JSON",
    bad_text: "damaged|JSON|utf-8",
    cut: "damaged or cut off",
    no_hdf5: "found neither",
    empty: "found neither",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_hdf5(tmp_path, damage):
    path = Made("first").h5(tmp_path / "model.h5")
    damage(path)
    before = sorted(entry.name for entry in tmp_path.iterdir())
    with pytest.raises(InputError, match=DAMAGES[damage]):
        convert(path, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before


def test_circle_of_groups(tmp_path):
    path = Made().weights_h5(tmp_path / "model.weights.h5")
    with h5py.File(path, "r+") as file:
        file["layers/rnn/again"] = file["layers"]
    with pytest.raises(InputError, match="levels; that is no checkpoint"):
        from_keras(path, Made().config())


@pytest.mark.parametrize("form", ["h5", "keras"])
def test_every_cut_is_found(tmp_path, form):
    """Whatever part of a file is missing, or overwritten, no other error than ours comes out."""
    made = Made()
    path = made.h5(tmp_path / "model") if form == "h5" else made.keras(tmp_path / "model")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for length in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            from_keras(path)
    for _ in range(40):
        harmed = bytearray(whole)
        for place in rng.integers(len(whole), size=4):
            harmed[place] = rng.integers(256)
        path.write_bytes(harmed)
        try:
            from_keras(path)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_archives(tmp_path):
    made = Made()
    path = tmp_path / "model.keras"
    for members, message in (
        ({"config_json": None}, "found no config.json"),
        ({"config_json": "[]"}, "expected a mapping"),
        ({"config_json": b"\x00" * (32 << 20)}, "that is no checkpoint"),
        ({"config_json": "{}"}, "class_name"),
    ):
        made.keras(path, **members)
        with pytest.raises(InputError, match=message):
            from_keras(path)
    made.keras(path)
    contents = zipfile.ZipFile(path)
    with zipfile.ZipFile(path.with_name("bomb.keras"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", contents.read("config.json"))
        archive.writestr("model.weights.h5", bytes(64 << 20))
    with pytest.raises(InputError, match=r"unpacks to 67,108,864 bytes"):
        from_keras(path.with_name("bomb.keras"))


def test_archive_that_lies_about_its_size(tmp_path):
    path = Made().keras(tmp_path / "model.keras")
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\x01\x02")  # the last entry of the directory: model.weights.h5
    data[at + 24 : at + 28] = struct.pack("<I", 100)
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        from_keras(path)


@pytest.mark.parametrize(
    ("key", "value", "shapes", "found"),
    [
        ("order", 5, {"kernel": (4, 2), "simple_rnn_cell/kernel": (10, 4)}, "order 6 and 5"),
        (
            "hidden_to_memory",
            True,
            {"kernel": (8, 2), "simple_rnn_cell/kernel": (12, 4)},
            "hidden_to_memory False and True",
        ),
    ],
)
def test_two_layers_share_their_settings(tmp_path, key, value, shapes, found):
    made = Made()
    config = made.config()
    second = json.loads(json.dumps(config["config"]["layers"][LMU]))
    config["config"]["layers"][LMU]["config"]["return_sequences"] = True
    second["config"]["name"] = "rnn_1"
    second["config"]["cell"]["config"][key] = value
    config["config"]["layers"].insert(2, second)
    rng = np.random.default_rng(0)
    layers = made.named()
    shapes = {"simple_rnn_cell/recurrent_kernel": (4, 4), "simple_rnn_cell/bias": (4,), **shapes}
    layers["rnn_1"] = {f"rnn_1/lmu_cell/{name}:0": rng.normal(size=shape) for name, shape in shapes.items()}
    with pytest.raises(InputError, match=f"share their settings, apart from theta; found {found}"):
        from_keras(made.h5(tmp_path / "model.h5", layers=layers, config=config))


@pytest.mark.parametrize("source", ["none.h5", ".", 7, None])
def test_no_file(tmp_path, source):
    with pytest.raises(InputError, match="no such file|found a folder|a path or a Keras model"):
        from_keras(tmp_path / source if isinstance(source, str) else source)


# ---------------------------------------------------------------- verification and output


def test_verification(tmp_path):
    made = Made()
    path, x = made.keras(tmp_path / "model.keras"), made.x()
    np.savez(tmp_path / "good.npz", x=x, y=made(x))
    np.savez(tmp_path / "bad.npz", x=x, y=made(x) + 0.01)
    np.savez(tmp_path / "shape.npz", x=x, y=made(x)[:, :2])
    np.savez(tmp_path / "names.npz", inputs=x)
    np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object), y=x)
    np.savez(tmp_path / "features.npz", x=x[..., :1], y=made(x))
    np.savez(tmp_path / "nan.npz", x=x, y=np.full_like(made(x), np.nan))
    result = convert(path, tmp_path / "out", data=tmp_path / "good.npz")
    assert result["difference"] < 1e-6
    assert "largest difference from the original" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(VerificationError, match=r"differ by up to 1\.00e-02"):
        convert(path, tmp_path / "other", data=tmp_path / "bad.npz")
    for name, message in (
        ("shape", "expected outputs of shape"),
        ("names", "arrays x and y"),
        ("objects", "numbers"),
        ("features", "input_size=3"),
        ("nan", "y: expected finite numbers"),
        ("absent", "npz"),
    ):
        with pytest.raises(InputError, match=message):
            convert(path, tmp_path / "other", data=tmp_path / f"{name}.npz")
    assert not (tmp_path / "other").exists()


def test_output_must_be_free(tmp_path):
    path = Made().keras(tmp_path / "model.keras")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("full", "model.keras"):
        with pytest.raises(InputError, match="already there"):
            convert(path, tmp_path / name)
    with pytest.raises(InputError, match="cannot be written"):
        convert(path, tmp_path / "model.keras" / "inside")
    convert(path, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_nothing_is_left_of_a_failed_write(tmp_path, monkeypatch):
    path = Made().keras(tmp_path / "model.keras")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lmu_hf.convert.keras.render", full)
    with pytest.raises(InputError, match="No space left"):
        convert(path, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.keras"]


def test_without_h5py(tmp_path, monkeypatch):
    path = Made().keras(tmp_path / "model.keras")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(InputError, match=r"pip install 'lmu-hf\[convert\]'"):
        from_keras(path)


def test_file_that_crashes_or_hangs_the_library(tmp_path, monkeypatch):
    """The HDF5 library gets to see a file in a process of its own first."""
    path = Made().h5(tmp_path / "model.h5")
    probe = tmp_path / "probe.py"
    monkeypatch.setattr("lmu_hf.convert.source.PROBE", probe)
    probe.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(InputError, match="HDF5 library crashes"):
        from_keras(path)
    monkeypatch.setattr("lmu_hf.convert.source.PROBE_SECONDS", 0.5)
    probe.write_text("while True: pass")
    with pytest.raises(InputError, match="does not come to an end"):
        from_keras(path)
