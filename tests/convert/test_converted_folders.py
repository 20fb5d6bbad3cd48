"""Layers around the LMU that models here have too: two directions, tokens, models inside of models."""

import copy

import numpy as np
import pytest
from keras_files import Made, softmax

from lmu_hf import LMUForTokenClassification
from lmu_hf.convert import convert, from_keras
from lmu_hf.errors import InputError

# float32 over 17 steps of numbers near one.
ROUNDING = 1e-6
OPTIONS = {"hidden_to_memory": True, "input_to_hidden": True}


def renamed(arrays, old, new):
    return {path.replace(old, new): array for path, array in arrays.items()}


def bidirectional(generation, *, classes=3, **values):
    """Two directions with weights of their own: what they compute, file layout and configuration."""
    ahead, back = (Made(generation, seed=seed, **(OPTIONS if generation == "first" else {})) for seed in (0, 1))
    rng = np.random.default_rng(2)
    kernel, bias = rng.normal(size=(8, classes)).astype(np.float32), rng.normal(size=classes).astype(np.float32)
    layers = {
        "bidirectional": {
            **renamed(ahead.named()["rnn"], "rnn/", "bidirectional/forward_rnn/"),
            **renamed(back.named()["rnn"], "rnn/", "bidirectional/backward_rnn/"),
        },
        "dense_9": {"dense_9/kernel:0": kernel, "dense_9/bias:0": bias},
    }
    config = ahead.config()
    inner = config["config"]["layers"][1]
    outer = {"name": "bidirectional", "merge_mode": "concat", "layer": inner} | values
    config["config"]["layers"][1] = {"class_name": "Bidirectional", "config": outer}

    def compute(x):
        both = np.concatenate([ahead.steps(x), back.steps(x[:, ::-1])[:, ::-1]], axis=-1)
        last = np.concatenate([both[:, -1, :4], both[:, 0, 4:]], axis=-1)
        steps = inner["config"]["return_sequences"]
        return softmax((both if steps else last) @ kernel + bias)

    return ahead, layers, config, compute


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("generation", ["2019", "first"])
def test_bidirectional(tmp_path, generation, steps):
    made, layers, config, compute = bidirectional(generation)
    config["config"]["layers"][1]["config"]["layer"]["config"]["return_sequences"] = steps
    conversion = from_keras(made.h5(tmp_path / "model.h5", layers=layers, config=config))
    assert conversion.model.config.bidirectional
    assert isinstance(conversion.model, LMUForTokenClassification) == steps
    np.testing.assert_allclose(conversion.predict(made.x()), compute(made.x()), rtol=0, atol=ROUNDING)


def test_backward_layer(tmp_path):
    """Keras 3 writes both directions; they must have the same settings."""
    made, layers, config, compute = bidirectional("first")
    outer = config["config"]["layers"][1]["config"]
    outer["backward_layer"] = copy.deepcopy(outer["layer"])
    outer["backward_layer"]["config"] |= {"name": "backward_rnn", "go_backwards": True}
    path = made.h5(tmp_path / "model.h5", layers=layers, config=config)
    np.testing.assert_allclose(from_keras(path).predict(made.x()), compute(made.x()), rtol=0, atol=ROUNDING)
    outer["backward_layer"]["config"]["cell"]["config"]["theta"] = 10.0
    with pytest.raises(InputError, match="backward layer has other settings"):
        from_keras(made.h5(tmp_path / "other.h5", layers=layers, config=config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_mode": "sum"}, "merge_mode='concat', found 'sum'"),
        ({"layer": {"class_name": "LSTM", "config": {"units": 3}}}, "around an LMU only"),
        ({"layer": None}, "around an LMU only"),
    ],
)
def test_bidirectional_of_another_kind(tmp_path, change, message):
    made, layers, config, _ = bidirectional("first", **change)
    with pytest.raises(InputError, match=message):
        convert(made.h5(tmp_path / "model.h5", layers=layers, config=config), tmp_path / "out")


def test_a_direction_is_missing(tmp_path):
    made, layers, config, _ = bidirectional("first")
    arrays = layers["bidirectional"]
    layers["bidirectional"] = {path: array for path, array in arrays.items() if "backward" not in path}
    with pytest.raises(InputError, match="expected a weight kernel"):
        from_keras(made.h5(tmp_path / "model.h5", layers=layers, config=config))
    layers["bidirectional"] = renamed(arrays, "backward_rnn", "rnn")
    with pytest.raises(InputError, match=r"expected forward_\.\.\. or backward_\.\.\. in its path"):
        from_keras(made.h5(tmp_path / "other.h5", layers=layers, config=config))


def test_go_backwards(tmp_path):
    made = Made("first", **OPTIONS)
    config = made.config()
    config["config"]["layers"][1]["config"]["go_backwards"] = True
    conversion = from_keras(made.h5(tmp_path / "model.h5", config=config))
    np.testing.assert_allclose(conversion.predict(made.x()), made(made.x()[:, ::-1]), rtol=0, atol=ROUNDING)


def tokens(made, **values):
    table = np.random.default_rng(5).normal(size=(11, made.inputs)).astype(np.float32)
    layers = {"embedding": {"embedding/embeddings:0": table}, **made.named()}
    config = made.config()
    config["config"]["layers"][0]["config"]["batch_input_shape"] = [None, None]
    embedding = {"name": "embedding", "input_dim": 11, "output_dim": made.inputs, "mask_zero": False} | values
    config["config"]["layers"].insert(1, {"class_name": "Embedding", "config": embedding})
    return table, layers, config


@pytest.mark.parametrize("generation", ["2019", "first"])
def test_tokens(tmp_path, generation):
    made = Made(generation)
    table, layers, config = tokens(made)
    path = made.h5(tmp_path / "model.h5", layers=layers, config=config)
    conversion = from_keras(path)
    x = np.random.default_rng(0).integers(11, size=(3, 17))
    np.testing.assert_allclose(conversion.predict(x), made(table[x]), rtol=0, atol=ROUNDING)
    np.savez(tmp_path / "data.npz", x=x, y=made(table[x]))
    np.savez(tmp_path / "beyond.npz", x=x + 1, y=made(table[x]))
    assert convert(path, tmp_path / "out", data=tmp_path / "data.npz")["difference"] < ROUNDING
    with pytest.raises(InputError, match="index out of range"):
        convert(path, tmp_path / "other", data=tmp_path / "beyond.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_zero": True}, "mask_zero=True masks token 0"),
        ({"input_dim": 12}, r"expected shape \(12, 3\), found \(11, 3\)"),
        ({"input_dim": "many"}, "expected a whole number"),
    ],
)
def test_tokens_that_do_not_convert(tmp_path, change, message):
    made = Made("first")
    _, layers, config = tokens(made, **change)
    with pytest.raises(InputError, match=message):
        from_keras(made.h5(tmp_path / "model.h5", layers=layers, config=config))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("form", ["h5", "weights"])
def test_a_model_in_the_model(tmp_path, whole, form):
    """An inner Sequential of the LMU alone, or of everything."""
    made = Made("0.9", **OPTIONS)
    config = made.config()
    first, lmu, dense = config["config"]["layers"]
    inner = {"name": "inner", "layers": [first, lmu, *[dense] * whole]}
    config["config"]["layers"] = [first, {"class_name": "Sequential", "config": inner}, *[dense] * (not whole)]
    if form == "h5":
        layers = made.named()
        layers = (
            {"inner": layers["rnn"] | layers["dense_9"]} if whole else {"inner": layers["rnn"], "dense_9": layers["dense_9"]}
        )
        path = made.h5(tmp_path / "model.h5", layers=layers, config=config)
    else:
        inside = ("layers/rnn", "layers/dense") if whole else ("layers/rnn",)
        groups = {
            f"layers/sequential/{group}" if group.startswith(inside) else group: arrays
            for group, arrays in made.groups().items()
        }
        made.groups = lambda: groups
        path = made.weights_h5(tmp_path / "model.weights.h5")
    conversion = from_keras(path, config)
    np.testing.assert_allclose(conversion.predict(made.x()), made(made.x()), rtol=0, atol=ROUNDING)


def test_models_whose_order_nothing_tells(tmp_path):
    """Keras 3 counts the names of each model by themselves: there are two groups rnn."""
    made = Made("0.9", hidden_to_memory=True)
    config = made.config()
    first, lmu, dense = config["config"]["layers"]
    below = copy.deepcopy(lmu)
    below["config"]["return_sequences"] = True
    inner = {"class_name": "Sequential", "config": {"name": "inner", "layers": [below]}}
    config["config"]["layers"] = [first, inner, lmu, dense]
    groups = made.groups()
    twice = {f"layers/sequential/{group}": arrays for group, arrays in groups.items() if "rnn" in group}
    made.groups = lambda: groups | twice
    with pytest.raises(InputError, match="different models inside of the model"):
        from_keras(made.weights_h5(tmp_path / "model.weights.h5"), config)


def test_mixed_precision_is_said(tmp_path):
    made = Made("first")
    config = made.config()
    config["config"]["layers"][1]["config"]["dtype"] = {"class_name": "Policy", "config": {"name": "mixed_float16"}}
    assert any("mixed precision" in note for note in from_keras(made.h5(tmp_path / "model.h5", config=config)).notes)
