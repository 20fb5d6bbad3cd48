"""Back to Keras. That keras-lmu itself loads the files is checked by tests/convert/check_keras_export.py, in its environment."""

import json
import zipfile

import numpy as np
import pytest
import torch
from keras_files import Made

from lmu_hf import LMUConfig, LMUForSequenceClassification, LMUModel
from lmu_hf.convert import export, from_keras
from lmu_hf.errors import InputError

LSTM = {"name": "lstm", "recurrent_activation": "hard_sigmoid", "use_bias": False}
CONFIGS = {
    "rnn": {"hidden_cell": "rnn", "use_bias": True, "hidden_to_memory": True, "memory_to_memory": True},
    "lstm": {"hidden_cell": LSTM, "hidden_act": "relu", "input_to_hidden": True},
    "gru": {"hidden_cell": "gru", "trainable_theta": True, "discretizer": "euler", "theta": 25.0},
    "dense": {"hidden_cell": "dense", "hidden_act": "gelu", "hidden_to_memory": True},
    "none": {"hidden_cell": None, "hidden_size": None},
    "no kernel": {"kernel_initializer": None, "memory_d": 3},
    "stack": {"hidden_cell": ["rnn", "gru", {"name": "rnn", "hidden_size": 3}], "num_hidden_layers": 1},
    "layers": {"num_hidden_layers": 2, "theta": [[9.0], [15.5]], "kernel_regularizer": {"name": "l2", "l2": 0.1}},
    "mean": {"pooling": "mean", "problem_type": "multi_label_classification", "dropout": 0.1},
    "max": {"pooling": "max", "problem_type": "single_label_classification", "classifier_dropout": 0.2},
}


def config_of(name, **more):
    base = {"input_size": 3, "memory_d": 2, "order": 6, "theta": 9.0, "hidden_size": 5, "num_labels": 4}
    return LMUConfig(**{**base, **CONFIGS[name], **more})


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(tmp_path, name, ending):
    model = LMUForSequenceClassification(config_of(name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1).add_(0.01)  # biases start at zero, and zero hides a lost one
    model.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / f"model{ending}")
    config = tmp_path / "ours" / "config.json" if ending != ".keras" else None
    back = from_keras(tmp_path / f"model{ending}", config).model
    assert back.state_dict().keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(back.state_dict()[key], value, rtol=0, atol=0, msg=key)
    x = torch.randn(2, 11, 3)
    torch.testing.assert_close(back(input_values=x).logits, model(input_values=x).logits, rtol=0, atol=0)
    same = ("theta", "discretizer", "pooling", "dropout", "classifier_dropout", "kernel_regularizer", "order", "memory_d")
    for field in same:
        assert getattr(back.config, field) == getattr(model.config, field), field


@pytest.mark.parametrize("every", [True, False])
def test_model_without_a_head(tmp_path, every):
    model = LMUModel(config_of("lstm", return_sequences=every)).eval()
    export(model, tmp_path / "model.keras")
    back = from_keras(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = model(input_values=torch.from_numpy(x))
    expected = expected.last_hidden_state if every else expected.pooler_output
    np.testing.assert_allclose(back.predict(x), expected.numpy(), rtol=0, atol=0)


def test_the_2019_cell_becomes_one_of_keras_lmu(tmp_path):
    made = Made("2019")
    export(from_keras(made.h5(tmp_path / "old.h5")).model, tmp_path / "new.keras")
    np.testing.assert_allclose(from_keras(tmp_path / "new.keras").predict(made.x()), made(made.x()), rtol=0, atol=1e-6)


def test_bfloat16_becomes_float32(tmp_path):
    model = LMUForSequenceClassification(config_of("rnn")).to(torch.bfloat16)
    export(model, tmp_path / "model.keras")
    back = from_keras(tmp_path / "model.keras").model
    assert back.dtype == torch.float32
    torch.testing.assert_close(back.score.weight, model.score.weight.float(), rtol=0, atol=0)


def test_names_of_keras(tmp_path):
    export(
        LMUForSequenceClassification(config_of("stack", problem_type="single_label_classification")), tmp_path / "m.keras"
    )
    with zipfile.ZipFile(tmp_path / "m.keras") as archive:
        config = json.loads(archive.read("config.json"))
    layers = config["config"]["layers"]
    assert [layer["class_name"] for layer in layers] == ["InputLayer", "RNN", "Dense"]
    assert layers[1]["config"]["cell"]["registered_name"] == "keras-lmu>LMUCell"
    assert layers[2]["config"]["activation"] == "softmax"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_type": "residual"}, "block_type='residual'"),
        ({"bidirectional": True}, "bidirectional=True"),
        ({"go_backwards": True}, "go_backwards=True"),
        ({"encoder_act": "relu"}, "encoder_act='relu'"),
        ({"vocab_size": 7}, "vocab_size=7"),
        ({"theta": [9.0, 8.0]}, "one per layer"),
        ({"hidden_cell": "readout", "input_size": 2}, "hidden cell 'readout'"),
        ({"hidden_act": "leaky_relu"}, "computes something else"),
    ],
)
def test_no_counterpart_in_keras(tmp_path, change, message):
    model = LMUForSequenceClassification(config_of("rnn", **{"hidden_to_memory": False, **change}))
    with pytest.raises(InputError, match=message):
        export(model, tmp_path / "model.keras")
    assert not list(tmp_path.iterdir())


def test_wrong_places(tmp_path):
    model = LMUForSequenceClassification(config_of("rnn"))
    for name, message in (
        ("model", "ends in .keras or .weights.h5"),
        ("model.h5", "ends in"),
        ("there.keras", "already there"),
    ):
        (tmp_path / "there.keras").touch()
        with pytest.raises(InputError, match=message):
            export(model, tmp_path / name)
    with pytest.raises(InputError, match=r"found no config.json"):
        export(tmp_path, tmp_path / "model.keras")
    (tmp_path / "config.json").write_text('{"model_type": "lmu", "architectures": ["LMUForSequenceClassification"]}')
    with pytest.raises(InputError, match="not a model that can be loaded"):
        export(tmp_path, tmp_path / "model.keras")
