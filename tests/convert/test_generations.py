"""Every generation and hidden cell against a plain computation in float64."""

import json

import numpy as np
import pytest
import torch
from keras_files import Made

from lmu_hf import LMUForSequenceClassification
from lmu_hf.convert import from_keras

# float32 over 17 steps of numbers near one.
ROUNDING = 1e-6

ALL = {"hidden_to_memory": True, "memory_to_memory": True, "input_to_hidden": True}
CASES = {
    "2019": {"generation": "2019"},
    "2019 euler": {"generation": "2019", "method": "euler", "theta": 20.0},
    "2019 bias": {"generation": "2019", "hidden_bias": True},
    "first rnn": {"generation": "first", **ALL},
    "first lstm": {"generation": "first", "cells": ["LSTM"], "hidden_to_memory": True},
    "first gru": {"generation": "first", "cells": ["GRU"], "memory_to_memory": True},
    "first gru reset before": {"generation": "first", "cells": ["GRU"], "reset_after": False, "hard_sigmoid": True},
    "first lstm hard": {"generation": "first", "cells": ["LSTM"], "hard_sigmoid": True},
    "first dense": {"generation": "first", "cells": ["Dense"]},
    "first none": {"generation": "first", "cells": []},
    "first stack": {"generation": "first", "cells": ["SimpleRNN", "SimpleRNN"]},
    "0.9 rnn": {"use_bias": True, **ALL},
    "0.9 lstm": {"cells": ["LSTM"], "input_to_hidden": True},
    "0.9 gru": {"cells": ["GRU"], "hidden_to_memory": True, "trainable_theta": True},
    "0.9 gru reset before": {"cells": ["GRU", "GRU"], "reset_after": False},
    "0.9 dense": {"cells": ["Dense"], "hidden_to_memory": True, "method": "euler", "theta": 20.0},
    "0.9 none": {"cells": [], "memory_to_memory": True},
    "0.9 none without kernel": {"cells": [], "kernel_initializer": None, "memory_d": 3},
    "0.9 stack": {"cells": ["SimpleRNN", "GRU", "SimpleRNN"], "hidden_to_memory": True},
    "0.9 order 64": {"order": 64, "theta": 200.0, "memory_d": 1, **ALL},
}


FORMS = [
    (name, form)
    for name, case in CASES.items()
    for form in ("h5", "keras", "weights")
    # Keras 2 alone wrote the others.
    if form == "h5" or (case.get("generation") != "first" and "bias" not in name)
]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_output_is_that_of_the_definition(tmp_path, name, form):
    made = Made(seed=len(name), **CASES[name])
    config = None
    if form == "h5":
        path = made.h5(tmp_path / "model.h5")
    elif form == "keras":
        path = made.keras(tmp_path / "model.keras")
    else:
        path, config = made.weights_h5(tmp_path / "model.weights.h5"), made.config()
    conversion = from_keras(path, config)
    assert isinstance(conversion.model, LMUForSequenceClassification)
    assert conversion.model.config.problem_type == "single_label_classification"
    np.testing.assert_allclose(conversion.predict(made.x()), made(made.x()), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("generation", ["2019", "first"])
def test_psmnist_size(tmp_path, generation):
    """Order 256, theta 784, 784 steps: within 1e-6 of the definition in float64, as the matrices here are exact."""
    made = Made(generation, units=212, order=256, theta=784.0, inputs=1, memory_d=1, **ALL)
    x = np.random.default_rng(1).uniform(0, 1, (2, 784, 1)).astype(np.float32)
    found = from_keras(made.h5(tmp_path / "model.h5")).predict(x)
    assert np.ptp(found) > 0.01
    np.testing.assert_allclose(found, made(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "variation",
    [
        {"text": bytes},
        {"pieces": 2},
        {"prefix": "training_4/"},
        {"optimizer": False},
        {"text": bytes, "pieces": 2, "prefix": "my_model/"},
    ],
    ids=str,
)
@pytest.mark.parametrize("generation", ["2019", "first"])
def test_harmless_variations(tmp_path, generation, variation):
    made = Made(generation, **({} if generation == "2019" else ALL))
    path = made.h5(tmp_path / "model.hdf5", **variation)
    np.testing.assert_allclose(from_keras(path).predict(made.x()), made(made.x()), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("method", "theta"), [("zoh", 9.0), ("zoh", 23.5), ("euler", 20.0)])
def test_2019_cell_that_does_not_serialize_itself(tmp_path, method, theta):
    """Keras before 2.4 wrote a cell without get_config as its name alone: sizes, theta and method are in the weights."""
    made = Made("2019", method=method, theta=theta)
    config = made.config()
    config["config"]["layers"][1]["config"]["cell"]["config"] = {"name": "lmu_cell", "trainable": True, "dtype": "float32"}
    conversion = from_keras(made.h5(tmp_path / "model.h5", config=config))
    # As close as float32 matrices tell it.
    assert conversion.model.config.theta == pytest.approx(theta, rel=1e-6)
    assert conversion.model.config.discretizer == method
    assert any("hidden_activation" in note for note in conversion.notes)
    np.testing.assert_allclose(conversion.predict(made.x()), made(made.x()), rtol=0, atol=ROUNDING)


def test_theta_of_psmnist_is_found(tmp_path):
    made = Made("2019", units=2, order=256, theta=784.0, inputs=1)
    config = made.config()
    del config["config"]["layers"][1]["config"]["cell"]["config"]["theta"]
    assert from_keras(made.h5(tmp_path / "model.h5", config=config)).model.config.theta == 784.0


@pytest.mark.parametrize("name", ["2019", "first rnn", "first stack", "0.9 gru", "0.9 stack"])
def test_weights_alone_with_our_own_configuration(tmp_path, name):
    made = Made(**CASES[name])
    kinds = {"SimpleRNN": "rnn", "GRU": "gru"}
    cells = [{"name": kinds[kind], "hidden_size": made.units, "use_bias": name != "2019"} for kind in made.cells]
    config = {
        "input_size": made.inputs,
        "memory_d": made.memory_d,
        "order": made.order,
        "theta": made.theta,
        "hidden_cell": cells,
        **made.options,
        "num_labels": made.classes,
        "problem_type": "single_label_classification",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = [made.h5(tmp_path / "weights.h5", config=None)]
    if made.generation != "first":
        files.append(made.weights_h5(tmp_path / "model.weights.h5"))
    for path in files:
        conversion = from_keras(path, tmp_path / "config.json")
        np.testing.assert_allclose(conversion.predict(made.x()), made(made.x()), rtol=0, atol=ROUNDING)


def test_float64_stays_float64(tmp_path):
    made = Made("0.9", cells=["LSTM"], **ALL)
    layers = {
        name: {key: value.astype(np.float64) for key, value in arrays.items()} for name, arrays in made.named().items()
    }
    conversion = from_keras(made.h5(tmp_path / "model.h5", layers=layers))
    assert conversion.model.dtype == torch.float64
    found = conversion.predict(made.x().astype(np.float64))
    # The memory's matrices agree to the same precision.
    np.testing.assert_allclose(found, made(made.x()), rtol=0, atol=1e-13)


def test_a_live_model():
    class Weight:
        def __init__(self, name, array):
            self.name, self.array, self.shape = name, array, array.shape

        def numpy(self):
            return self.array

    class Layer:
        def __init__(self, name, arrays):
            self.name, self.weights = name, [Weight(key, array) for key, array in arrays.items()]

    class Model:
        name, loss = "sequential", "categorical_crossentropy"
        made = Made("first", **ALL)
        layers = [Layer("input_1", {}), *[Layer(name, arrays) for name, arrays in made.named().items()]]  # noqa: RUF012

        def to_json(self):
            return json.dumps({**self.made.config(), "keras_version": "2.12.0"})

    conversion = from_keras(Model())
    np.testing.assert_allclose(conversion.predict(Model.made.x()), Model.made(Model.made.x()), rtol=0, atol=ROUNDING)
