"""Files of weights alone: what they tell of their model, and what has to be given."""

import json

import numpy as np
import pytest
from keras_files import Made
from typer.testing import CliRunner

from lmu_hf.cli import app
from lmu_hf.convert import from_keras
from lmu_hf.errors import InputError

# float32 over 17 steps of numbers near one.
ROUNDING = 1e-6

H2M, M2M, I2H = {"hidden_to_memory": True}, {"memory_to_memory": True}, {"input_to_hidden": True}
TOLD = {
    "2019": {"generation": "2019"},
    "2019 bias": {"generation": "2019", "hidden_bias": True},
    "2019 euler": {"generation": "2019", "method": "euler", "theta": 20.0},
    "2019 order 1": {"generation": "2019", "order": 1},
    "first rnn": {"generation": "first", **H2M, **M2M, **I2H},
    "first lstm": {"generation": "first", "cells": ["LSTM"], **H2M, **I2H},
    "first gru": {"generation": "first", "cells": ["GRU"], **M2M},
    "first gru reset before": {"generation": "first", "cells": ["GRU"], "reset_after": False},
    "first none": {"generation": "first", "cells": []},
    "first uncoupled": {"generation": "first", "memory_d": 1},
}


def probabilities(conversion, x):
    """The softmax that the original applied, which its weights do not tell."""
    conversion.activation = "softmax"
    return conversion.predict(x)


@pytest.mark.parametrize("name", TOLD)
def test_old_generations_tell_everything(tmp_path, name):
    made = Made(**TOLD[name])
    path = made.h5(tmp_path / "weights.hdf5", config=None)
    conversion = from_keras(path)
    config = conversion.model.config
    assert (config.order, config.num_labels) == (made.order, 3)
    if made.order > 1:  # of order 1, Euler with another theta is the same system
        assert config.theta == pytest.approx(made.theta, rel=1e-6)
    assert any("compare with outputs of the original" in note for note in conversion.notes)
    np.testing.assert_allclose(probabilities(conversion, made.x()), made(made.x()), rtol=0, atol=ROUNDING)


def test_psmnist_of_1_file_of_weights(tmp_path):
    made = Made("2019", units=5, order=256, theta=784.0, inputs=1)
    conversion = from_keras(made.h5(tmp_path / "psMNIST-weights.hdf5", config=None))
    assert (conversion.model.config.theta, conversion.model.config.discretizer) == (784.0, "zoh")
    x = np.random.default_rng(1).uniform(0, 1, (2, 784, 1)).astype(np.float32)
    np.testing.assert_allclose(probabilities(conversion, x), made(x), rtol=0, atol=ROUNDING)


def test_memory_of_a_parallel_layer(tmp_path):
    """LMUFFT of the first releases keeps A, B and a kernel that is always one in a layer inside."""
    made = Made("first", memory_d=1, **I2H)
    layers = made.named()
    arrays = layers["rnn"]
    moved = {"lmu/rnn/lmu_cell/kernel:0": np.ones((1, 1), np.float32)}
    for path, array in arrays.items():
        leaf = path.removeprefix("rnn/lmu_cell/")
        moved[f"lmu/rnn/lmu_cell/{leaf}" if leaf in ("A:0", "B:0") else f"lmu/{leaf}"] = array
    layers = {"lmu": moved, "dense_9": layers["dense_9"]}
    conversion = from_keras(made.h5(tmp_path / "weights.h5", config=None, layers=layers))
    np.testing.assert_allclose(probabilities(conversion, made.x()), made(made.x()), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("generation", "reshape"),
    [
        ("2019", {"AT": (1, 6, 6), "BT": (6,), "input_encoders": (1, 3), "memory_encoders": (6,)}),
        ("first", {"A": (1, 6, 6), "B": (1, 1, 6)}),
        ("first", {"B": (6, 1)}),
    ],
)
def test_axes_of_one(tmp_path, generation, reshape):
    made = Made(generation, **({} if generation == "2019" else I2H))
    layers = made.named()
    for path, array in layers["rnn"].items():
        leaf = path.rsplit("/", 1)[1].removesuffix(":0")
        layers["rnn"][path] = array.reshape(reshape.get(leaf, array.shape))
    whole = from_keras(made.h5(tmp_path / "model.h5", layers=layers))
    np.testing.assert_allclose(whole.predict(made.x()), made(made.x()), rtol=0, atol=ROUNDING)
    told = from_keras(made.h5(tmp_path / "weights.h5", layers=layers, config=None))
    np.testing.assert_allclose(probabilities(told, made.x()), made(made.x()), rtol=0, atol=ROUNDING)


def test_what_is_not_told_is_given(tmp_path):
    """theta and order of later generations, and the feedback where a kernel of 7 rows can be of 7 inputs or of 3 + 4."""
    made = Made("0.9", **H2M, **M2M, use_bias=True)
    path = made.h5(tmp_path / "weights.h5", config=None)
    given = {"order": 6, "theta": 9}
    with pytest.raises(InputError, match='give at least "order", "theta"'):
        from_keras(path)
    with pytest.raises(InputError, match="expected input_size too.* 7 rows is of 7 inputs, or of 3 and the 4 hidden units"):
        from_keras(path, given)
    for more in ({"hidden_to_memory": True}, {"input_size": 3}):
        conversion = from_keras(path, {**given, **more, "problem_type": "single_label_classification"})
        np.testing.assert_allclose(conversion.predict(made.x()), made(made.x()), rtol=0, atol=ROUNDING)
    text = json.dumps({**given, "input_size": 3})
    result = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out"), "--config", text])
    assert result.exit_code == 0, result.output
    assert (
        "note: the weights tell the architecture but for hidden_act='tanh', pooling='last', problem_type=None (logits)"
        in result.output
    )


def test_given_fields_decide(tmp_path):
    made = Made("2019")
    path = made.h5(tmp_path / "weights.h5", config=None)
    conversion = from_keras(path, {"hidden_act": "relu", "pooling": "mean", "problem_type": "regression"})
    assert (conversion.model.config.hidden_act, conversion.model.config.pooling) == ("relu", "mean")
    assert not any("usual" in note for note in conversion.notes)
    with pytest.raises(InputError, match="theta 10"):
        from_keras(path, {"theta": 10})


def test_no_bias_in_the_head(tmp_path):
    made = Made("2019")
    layers = made.named()
    made.head["bias"][:] = 0
    del layers["dense_9"]["dense_9/bias:0"]
    conversion = from_keras(made.h5(tmp_path / "weights.h5", config=None, layers=layers))
    np.testing.assert_allclose(probabilities(conversion, made.x()), made(made.x()), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("harm", ["shape", "order", "kind", "names"])
def test_hostile_weights(tmp_path, harm):
    made = Made("first", **I2H)
    layers = made.named()
    changes = {
        "shape": {"A:0": np.zeros((6, 5), np.float32)},
        "order": {"A:0": np.zeros((1, 8000), np.float32)},
        "kind": {"simple_rnn_cell/recurrent_kernel:0": np.zeros((4, 9), np.float32)},
        "names": {"evil:0": np.zeros((4, 9), np.float32)},
    }[harm]
    layers["rnn"] |= {f"rnn/lmu_cell/{name}": array for name, array in changes.items()}
    with pytest.raises(InputError):
        from_keras(made.h5(tmp_path / "weights.h5", config=None, layers=layers))


def test_weights_alone_need_an_architecture(tmp_path):
    made = Made()
    for path in (made.weights_h5(tmp_path / "a.weights.h5"), made.h5(tmp_path / "b.h5", config=None)):
        with pytest.raises(
            InputError, match=r"found weights alone.* (only places|give at least \"order\", \"theta\").*to_json"
        ):
            from_keras(path)
        for config, message in (
            ({"order": -1, "num_labels": 3}, "order"),
            (
                {"memory_d": 2, "order": 5, "theta": 9.0, "input_size": 3, "hidden_size": 4, "num_labels": 3},
                "shape|found none",
            ),
            ({"memory_d": 2, "theta": 9.0, "input_size": 3, "num_labels": 3}, "order"),
            ({"memory_d": 2, "order": 6, "input_size": 3, "num_labels": 3}, "theta"),
            ({"block_type": "residual"}, "block_type='residual'"),
            ({"theta": [9.0, 8.0], "memory_d": 2}, "one per layer"),
            ([], "expected a mapping"),
            (tmp_path / "none.json", "No such file"),
        ):
            with pytest.raises(InputError, match=message):
                from_keras(path, config)


@pytest.mark.parametrize("generation", ["first", "0.9"])
@pytest.mark.parametrize("options", [{}, H2M | M2M | I2H, I2H | {"memory_d": 1}], ids=str)
def test_names_without_groups(tmp_path, generation, options):
    """TensorFlow 2.0 named weights of cells inside of cells without their scopes: kernel, kernel_1."""
    made = Made(generation, **options)
    layers = made.named()
    flat = {}
    for path, array in [*layers["rnn"].items()][::-1]:  # made writes the hidden cell first
        leaf = path.rsplit("/", 1)[1].removesuffix(":0")
        flat[f"rnn/{leaf}{'_1' * (f'rnn/{leaf}:0' in flat)}:0"] = array
    layers["rnn"] = flat
    path = made.h5(tmp_path / "model.h5", layers=layers)
    np.testing.assert_allclose(from_keras(path).predict(made.x()), made(made.x()), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", ["my_cell", "while/body/simple_rnn_cell_3"])
def test_group_of_another_name(tmp_path, name):
    made = Made("first", **H2M, **I2H)
    layers = made.named()
    layers["rnn"] = {path.replace("lmu_cell/simple_rnn_cell", name): array for path, array in layers["rnn"].items()}
    path = made.h5(tmp_path / "model.h5", layers=layers)
    np.testing.assert_allclose(from_keras(path).predict(made.x()), made(made.x()), rtol=0, atol=ROUNDING)
