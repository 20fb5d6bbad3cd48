"""Tasks of values and of series through everything: training, record, pictures, evaluation, prediction, card."""

import json
import re

import numpy as np
import pytest
import torch
from test_card import check_form, code_of, output_of
from transformers import EvalPrediction
from typer.testing import CliRunner

from lmu_hf import tasks
from lmu_hf.card import write_card
from lmu_hf.cli import app
from lmu_hf.errors import InputError
from lmu_hf.evaluation import load_model
from lmu_hf.experiment import Experiment
from lmu_hf.hub import collect
from lmu_hf.kinds import KINDS, TrainerMetrics
from lmu_hf.model.processing_lmu import LMUFeatureExtractor
from lmu_hf.tasks.base import Part, TaskData
from lmu_hf.training import train

HORIZON = 3


def waves(kind, rows, seed):
    rng = np.random.default_rng(seed)
    values, labels = [], []
    for _ in range(rows):
        steps = int(rng.integers(40, 60))
        period, phase = rng.uniform(8, 16), rng.uniform(0, 6)
        wave = np.sin(2 * np.pi * np.arange(steps + HORIZON) / period + phase).astype(np.float32)[:, None]
        values.append(wave[:steps])
        labels.append(wave[HORIZON:] if kind == "series" else [period - 12, wave[0, 0]])
    return Part(values, labels if kind == "series" else np.array(labels))


@pytest.fixture
def waves_task(monkeypatch):
    """A task of either kind, in place of the digits, in this process only."""

    def use(kind):
        def load(name, data=None, processor=None, **options):
            series = kind == "series"
            parts = {part: waves(kind, rows, rows) for part, rows in (("train", 60), ("validation", 20), ("test", 21))}
            return TaskData(
                name="digits",
                parts=parts,
                processor=processor or LMUFeatureExtractor(mean=0.0, std=1.0),
                label_names=["wave"] if series else ["period", "first value"],
                dataset={"name": "waves", "id": None, "unit": "volts", "rows": {n: len(p) for n, p in parts.items()}},
                kind=kind,
                fields={"horizon": HORIZON} if series else {},
                predicts_input=series,
            )

        monkeypatch.setattr("lmu_hf.evaluation.load_task", load)
        monkeypatch.setattr(tasks, "load_task", load)

    return use


def experiment(**model):
    return Experiment.from_dict(
        {
            "name": "waves",
            "task": {"name": "digits"},
            "model": model or {"order": 8, "theta": 16, "hidden_size": 16, "hidden_cell": "rnn"},
            "training": {"num_train_epochs": 12, "learning_rate": 0.02, "per_device_train_batch_size": 10},
        }
    )


def run(*arguments):
    finished = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert finished.exit_code == 0, finished.output
    return finished.stdout


@pytest.mark.parametrize("kind", ["series", "regression"])
def test_from_training_to_card(kind, waves_task, tmp_path, capsys):
    waves_task(kind)
    result = train(experiment(), tmp_path / "model", progress=False)
    assert "validation loss" in (log := capsys.readouterr().out)
    assert "nrmse" in log
    series = kind == "series"
    assert result["kind"] == kind
    assert result["chosen_by"] == "nrmse"
    assert list(result["scores"]["test"]) == ["nrmse", "mse"]
    assert result["scores"]["test"]["nrmse"] < (0.35 if series else 0.8)  # learned something: the mean alone scores 1
    best = min(result["history"], key=lambda entry: entry["nrmse"])
    assert best["epoch"] == result["best_epoch"]
    assert best["nrmse"] == pytest.approx(result["scores"]["validation"]["nrmse"], rel=1e-4)
    assert ("targets" in result) == (not series)
    shown = result["predictions"]
    assert len(shown["true"]) == len(shown["predicted"]) == (len(waves(kind, 21, 21).values[0]) if series else 21)
    assert (tmp_path / "model" / "predictions.png").is_file()
    json.dumps(result, allow_nan=False)

    scores = json.loads(run("evaluate", tmp_path / "model", "--json"))
    assert {name: scores[name] for name in ("nrmse", "mse")} == pytest.approx(result["scores"]["test"], rel=1e-5)
    table = run("evaluate", tmp_path / "model")
    assert "wave" in table if series else "period" in table

    np.savetxt(tmp_path / "a.csv", np.sin(np.arange(50) / 2)[:, None], delimiter=",")
    (answer,) = json.loads(run("predict", tmp_path / "model", tmp_path / "a.csv", "--json"))
    if series:
        assert len(answer["predictions"]["wave"]) == 50
        assert answer["predictions"]["wave"][-1] == pytest.approx(np.sin((49 + HORIZON) / 2), abs=0.5)
    else:
        assert set(answer["values"]) == {"period", "first value"}
    run("predict", tmp_path / "model", tmp_path / "a.csv")

    card = write_card(collect(tmp_path / "model")[0], "ada/waves")
    assert check_form(card) == ["Use", "Scores", "Data", "Training", "Limits", "Licence", "Citation"]
    for fact in (
        f"{100 * result['scores']['test']['nrmse']:.2f} %",
        "best validation NRMSE",
        "predictions.png",
        "type: nrmse",
        "Values are in volts",
        "predicts the value 3 steps ahead of a time series" if series else "computes 2 values from a time series",
    ):
        assert fact in card, fact
    assert re.match(r"\[-?\d", output_of(card))
    assert ("AutoModelForTimeSeriesPrediction" in code_of(card)) == series


@pytest.mark.parametrize("cell", ["lstm", "gru", ["lmu", "lstm"]])
@pytest.mark.parametrize("kind", ["series", "regression"])
def test_baselines(kind, cell, waves_task, tmp_path):
    """The same task, heads, pooling and scores."""
    waves_task(kind)
    stack = {"model_type": "recurrent", "cell": cell, "hidden_size": [12, 14], "num_hidden_layers": 2}
    lmu = {"lmu": {"memory_d": 1, "order": 4, "theta": 4, "hidden_to_memory": True, "input_to_hidden": True}}
    result = train(experiment(**stack, **(lmu if "lmu" in cell else {})), tmp_path / "model", progress=False)
    assert result["scores"]["test"]["nrmse"] < 1
    model, _ = load_model(tmp_path / "model")
    assert result["parameters"]["total"] == sum(p.numel() for p in model.parameters())
    assert "auto_map" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert not list((tmp_path / "model").glob("modeling*.py"))
    # Padding behind the end changes nothing.
    values = torch.randn(2, 9, 1)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, 6:] = 0
    values[0, 6:] = torch.nan
    answers = KINDS[kind].answers
    with torch.no_grad():
        padded, alone = (
            answers(model(input_values=values, attention_mask=mask)),
            answers(model(input_values=values[:1, :6])),
        )
    padded = padded[:1, :6] if kind == "series" else padded[:1]
    torch.testing.assert_close(padded, alone)
    with pytest.raises(ValueError, match="padding behind the end only"):
        model(input_values=values, attention_mask=mask.flip(1))


def test_a_lstm_begins_by_remembering():
    from lmu_hf.baselines import RecurrentConfig, RecurrentForSequenceClassification

    model = RecurrentForSequenceClassification(RecurrentConfig(cell="lstm", hidden_size=5, num_labels=2))
    bias = (model.model.layers[0].bias_ih_l0 + model.model.layers[0].bias_hh_l0).view(4, 5)
    assert bias.mean(1).tolist() == [0, 1, 0, 0]
    recurrent = model.model.layers[0].weight_hh_l0
    torch.testing.assert_close(recurrent.mT @ recurrent, torch.eye(5))


def test_wrong_baselines_are_one_line(waves_task, tmp_path):
    waves_task("series")
    with pytest.raises(InputError, match="model.model_type: expected one of .*found 'rnn'"):
        experiment(model_type="rnn")
    with pytest.raises(InputError, match="model: unknown key 'order'"):
        experiment(model_type="recurrent", order=3)
    for model, message in [
        ({"cell": "tanh"}, "model.cell: expected one of"),
        ({"cell": ["lstm"], "hidden_size": [2, 3]}, "model.cell, hidden_size: expected one value"),
        ({"horizon": 4}, "model.horizon: the task digits needs 3, found 4; leave it out"),
    ]:
        with pytest.raises(InputError, match=message):
            train(experiment(model_type="recurrent", **model), tmp_path / "model", progress=False)
        assert not (tmp_path / "model").exists()


def test_errors_are_those_of_the_whole_part():
    """In batches as at once, with values that are not known, and where a large mean would drown a small spread."""
    true = 1e6 + torch.randn(7, 5, 2, dtype=torch.float64)
    found = true + 0.1 * torch.randn(7, 5, 2, dtype=torch.float64)
    true[0, 2, 1] = torch.nan
    known = ~true.isnan()
    error = torch.where(known, found - true, 0).square().sum()
    mean = true.nanmean((0, 1))
    spread = torch.where(known, true - mean, 0).square().sum()
    expected = {"nrmse": float((error / spread).sqrt()), "mse": float(error / known.sum())}
    measure = TrainerMetrics(KINDS["series"], ["a", "b"])
    for _ in range(2):  # a second evaluation begins anew
        for rows in (slice(0, 3), slice(3, 6)):
            assert measure(EvalPrediction(found[rows], true[rows])) == {}
        assert measure(EvalPrediction(found[6:], true[6:]), compute_result=True) == pytest.approx(expected, rel=1e-9)
    constant = KINDS["regression"].meter(["a"])
    constant.add(torch.zeros(3, 1), torch.ones(3, 1))
    with pytest.raises(InputError, match="NRMSE needs a spread"):
        constant.scores()
