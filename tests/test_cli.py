"""The command line as a person meets it: one real run from start to end, and one line for everything that is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_data import write_images
from PIL import Image
from typer.testing import CliRunner

from lmu_hf.cli import app
from lmu_hf.evaluation import score_in_fresh_process, verify_in_fresh_process
from lmu_hf.tasks import load_task

QUICK = ["training.num_train_epochs=2", "model.order=8", "model.hidden_size=20"]


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_process(*arguments, **kwargs):
    command = [sys.executable, "-m", "lmu_hf.cli", *[str(argument) for argument in arguments]]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The main job, as the README has it: no argument, the built-in digits."""
    folder = tmp_path_factory.mktemp("main")
    finished = run_process("train", "--no-progress", "--output", folder / "model", cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return folder / "model", finished.stdout


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory):
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for index in range(10):
        Image.fromarray(np.round(digits.images[index] * 255 / 16).astype(np.uint8)).save(folder / f"{index}.png")
    return [folder / f"{index}.png" for index in range(10)], digits.target[:10]


def test_train(trained):
    folder, output = trained
    result = json.loads((folder / "result.json").read_text())
    assert result["scores"]["test"]["accuracy"] >= 0.96
    assert result["reloaded"]["same"]
    assert result["reloaded"]["accuracy"] == result["scores"]["test"]["accuracy"]
    assert result["seconds"]["total"] < 60
    assert result["parameters"]["trainable"] == result["parameters"]["total"]
    assert result["experiment"]["seed"] == 0
    assert len(result["history"]) == result["experiment"]["training"]["num_train_epochs"]
    assert {"torch", "transformers", "lmu_hf", "python"} <= set(result["versions"])
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".py") == [
        "config.json",
        "confusion_matrix.png",
        "example.png",
        "learning_curve.png",
        "model.safetensors",
        "preprocessor_config.json",
        "result.json",
    ]
    assert sum(map(sum, result["confusion"]["test"])) == result["dataset"]["rows"]["test"]
    assert result["example"]["label"] in result["confusion"]["labels"]
    assert f"{result['scores']['test']['accuracy']:.4f}" in output
    # Files that are published must not tell where they were made.
    assert not any(str(folder.parent) in path.read_text() for path in folder.glob("*.json"))


def test_what_a_reload_finds(digits_model, tmp_path):
    scores = json.loads((digits_model / "result.json").read_text())["scores"]["test"]
    assert verify_in_fresh_process(digits_model, None, scores) == {**scores, "same": True}
    for metric, value in scores.items():
        with pytest.raises(RuntimeError, match=f"the reloaded model scores differently: expected .*'{metric}'"):
            verify_in_fresh_process(digits_model, None, {**scores, metric: value + 0.001})
    with pytest.raises(RuntimeError, match=r"could not be evaluated in a fresh process:\n.*holds no config\.json"):
        score_in_fresh_process(tmp_path, None)


def test_evaluate(trained):
    folder, _ = trained
    expected = json.loads((folder / "result.json").read_text())["scores"]
    for part in ("validation", "test"):
        finished = run("evaluate", folder, "--part", part, "--json")
        assert finished.exit_code == 0
        scores = json.loads(finished.stdout)
        assert scores["accuracy"] == expected[part]["accuracy"]
        assert scores["loss"] == pytest.approx(expected[part]["loss"], rel=1e-5)
        assert sum(map(sum, scores["confusion"])) == scores["rows"]
    table = run("evaluate", folder).stdout
    assert f"accuracy {expected['test']['accuracy']:.4f}" in table
    assert "most often taken for" in table


def test_predict_images(trained, digit_files):
    folder, _ = trained
    files, labels = digit_files
    finished = run("predict", folder, *files, "--json")
    predictions = [max(row["probabilities"], key=row["probabilities"].get) for row in json.loads(finished.stdout)]
    assert sum(int(p) == label for p, label in zip(predictions, labels, strict=True)) >= 9
    # Sixteen bits per pixel are scaled, not cut.
    deep = np.asarray(Image.open(files[0])).astype(np.uint16) * 257
    Image.fromarray(deep).save(files[0].with_name("deep.png"))
    both = json.loads(run("predict", folder, files[0], files[0].with_name("deep.png"), "--json").stdout)
    assert both[0]["probabilities"] == both[1]["probabilities"]
    table = run("predict", folder, files[0]).stdout
    assert "probability" in table
    assert predictions[0] in table


def test_signals_from_training_to_prediction(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for index in range(120):
        label = index % 2
        t = np.arange(30 + index % 11)
        signal = np.stack([np.sin(t / (3 if label else 6)), np.cos(t / 4)], -1) + rng.normal(0, 0.1, (len(t), 2))
        rows.append({"signal": signal.tolist(), "label": ["slow", "fast"][label]})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(
        "name: waves\ntask: {name: signals}\n"
        "model: {memory_d: 2, order: 8, theta: 30, hidden_cell: dense, hidden_act: relu, hidden_size: 16}\n"
        "training: {num_train_epochs: 25, learning_rate: 0.01, per_device_train_batch_size: 16, metric_for_best_model: loss}\n"
    )
    finished = run(
        "train", tmp_path / "run.yaml", "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out", "--no-progress"
    )
    assert finished.exit_code == 0, finished.output
    assert json.loads((tmp_path / "out" / "result.json").read_text())["scores"]["test"]["accuracy"] == 1.0

    # The data is scaled as the model learned it, not anew: shifted signals must not look the same.
    def evaluate(name):
        finished = run("evaluate", tmp_path / "out", "--data", tmp_path / name, "--part", "all", "--json")
        return json.loads(finished.stdout)

    everything = evaluate("data.jsonl")
    assert everything["rows"] == 120
    assert everything["accuracy"] == 1.0
    moved = [{**row, "signal": (np.array(row["signal"]) + 5).tolist()} for row in rows]
    (tmp_path / "moved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in moved))
    assert evaluate("moved.jsonl")["loss"] > everything["loss"] + 0.1

    fast = np.array(rows[1]["signal"])
    np.savetxt(tmp_path / "fast.csv", fast, delimiter=",", header="left,right", comments="")
    np.save(tmp_path / "slow.npy", np.array(rows[0]["signal"]))
    finished = run("predict", tmp_path / "out", tmp_path / "fast.csv", tmp_path / "slow.npy", "--json")
    labels = [next(iter(row["probabilities"])) for row in json.loads(finished.stdout)]
    assert labels == ["fast", "slow"]

    np.savetxt(tmp_path / "narrow.csv", fast[:, :1], delimiter=",")
    (tmp_path / "bom.csv").write_text("\ufeff" + "\n".join(f"{a},{b}" for a, b in fast))
    same = json.loads(run("predict", tmp_path / "out", tmp_path / "fast.csv", tmp_path / "bom.csv", "--json").stdout)
    assert same[0]["probabilities"] == pytest.approx(same[1]["probabilities"], abs=1e-6)
    fast[4, 1] = np.nan
    np.savetxt(tmp_path / "nan.csv", fast, delimiter=",")
    (tmp_path / "words.csv").write_text("1.0,2.0\nthree,four\n")
    (tmp_path / "typo.csv").write_text("O.5,1\n1.0,2.0\n")
    (tmp_path / "comment.csv").write_text("1.0,2.0\n#1.0,2.0\n")
    np.save(tmp_path / "complex.npy", fast + 1j)
    (tmp_path / "nothing.npy").write_bytes(b"")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "picture.png").write_bytes(b"")
    for name, message in [
        ("narrow.csv", "channels=2), found"),
        ("nan.csv", "at step 4"),
        ("words.csv", "could not convert string 'three'"),
        ("empty.csv", "empty file"),
        ("typo.csv", "could not convert string 'O.5'"),
        ("comment.csv", "could not convert string '#1.0'"),
        ("complex.npy", "found an array of complex128"),
        ("nothing.npy", "nothing.npy"),
        ("picture.png", "this model takes signals (.csv, .npy)"),
        ("missing.csv", "no file"),
    ]:
        refused = run("predict", tmp_path / "out", tmp_path / name)
        assert refused.exit_code == 2, name
        assert message in refused.stderr, name
        assert len(refused.stderr.strip().splitlines()) == 1, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "config: no file nowhere.yaml"),
        (["train", "model.ordr=3"], "unknown key 'ordr'; did you mean 'order'"),
        (["train", "model.order=-3"], "model.order: expected a whole number"),
        (["train", "model.order=x"], "Field 'order' expected int"),
        (["train", "model.vocab_size=5"], "model.vocab_size: the tasks give continuous signals"),
        (["train", "model.input_size=3"], "model.input_size: the data has 1 features per step, found 3"),
        (["train", "model.discretizer=euler", "model.order=32"], "smallest stable theta"),
        (["train", "training.lr_scheduler_type=magic"], "training: magic is not a valid SchedulerType"),
        (["train", "task.name=imagenet"], "task: expected one of"),
        (["train", "--data", "somewhere"], "leave out --data"),
        (["train", "--data", ""], "found an empty text"),
        (["train", "--output", ""], "found an empty text"),
        (["train", "--output", "/proc/nowhere"], "cannot be used as a folder"),
        (["train", "--seed", "-1"], "seed: expected a whole number within"),
        (["train", "task.permute=maybe"], "task.permute: expected true or false"),
        (["train", "name=.."], "name: expected letters"),
        (["train", "training.num_train_epochs=0"], "training.num_train_epochs: expected a number > 0, found 0"),
        (["train", "training.learning_rate=abc"], "training.learning_rate: expected a number >= 0"),
        (["train", "training.per_device_train_batch_size=2.5"], "expected a whole number >= 1, found 2.5"),
        (["train", "training.metric_for_best_model=foo"], "metric_for_best_model: expected one of"),
        (["train", "training.report_to=wandb"], "training.report_to: wandb is not installed; pip install wandb"),
        (["train", "training.resume_from_checkpoint=x"], "set by the run"),
        (["train", "training.push_to_hub=true"], "a run does not publish; use `lmu-hf push"),
        (["evaluate", "nowhere/at/all"], "model: nowhere/at/all could not be loaded"),
        (["evaluate", "."], "holds no config.json"),
        (["predict", ".", "a.png"], "holds no config.json"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished = run(*arguments)
    assert finished.exit_code == 2, finished.output
    assert message in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1
    # Nothing is left behind by a run that never began.
    assert not any(tmp_path.iterdir())


def test_a_model_is_never_overwritten(trained):
    folder, _ = trained
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    finished = run("train", "--output", folder)
    assert finished.exit_code == 2
    assert "already holds a model and is left as it is" in finished.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_images_that_do_not_fit(trained, tmp_path):
    folder, _ = trained
    Image.fromarray(np.zeros((9, 8), dtype=np.uint8)).save(tmp_path / "tall.png")
    Image.fromarray(np.zeros((8, 8, 4), dtype=np.uint8)).save(tmp_path / "clear.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    for name, message in [
        ("tall.png", "expected 8 x 8 pixels, found 8 x 9"),
        ("clear.png", "transparent pixels"),
        ("broken.png", "broken.png"),
        ("table.csv", "no file"),
    ]:
        finished = run("predict", folder, tmp_path / name)
        assert finished.exit_code == 2
        assert message in finished.stderr


def test_damaged_models_are_named(trained, tmp_path):
    folder, _ = trained
    config = json.loads((folder / "config.json").read_text())
    cases = {
        "other_cell": ("config.json", json.dumps({**config, "hidden_cell": "rnn"}), "missing keys"),
        "wrong_type": ("config.json", json.dumps({**config, "order": "many"}), "could not be loaded"),
        "no_config": ("config.json", "[]", "could not be loaded"),
        "result": ("result.json", "{}", "is damaged"),
        "result_text": ("result.json", "nothing", "is damaged"),
        "processor": ("preprocessor_config.json", "{}", "expected 28 x 28 pixels"),
    }
    for name, (file, text, message) in cases.items():
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        (copy / file).write_text(text)
        finished = run("evaluate", copy)
        assert finished.exit_code == 2, (name, finished.output, finished.exception)
        assert message in finished.stderr, name
        assert len(finished.stderr.strip().splitlines()) == 1, name


def test_penalties_do_not_change_the_reported_loss(tmp_path):
    settings = ["model.kernel_regularizer=l2", "training.label_smoothing_factor=0.1"]
    finished = run("train", *QUICK, *settings, "--output", tmp_path / "out", "--no-progress")
    assert finished.exit_code == 0, finished.output
    assert json.loads((tmp_path / "out" / "result.json").read_text())["reloaded"]["same"]


@pytest.mark.parametrize("name", ["psmnist-lmu", "psmnist-plmu"])
def test_published_configs_run(name, tmp_path):
    write_images(tmp_path / "train-0.parquet", [i % 10 for i in range(60)])
    write_images(tmp_path / "test-0.parquet", [i % 10 for i in range(20)], seed=1)
    quick = ["training.num_train_epochs=1", "model.order=12", "model.hidden_size=6"]
    config = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    finished = run("train", config, *quick, "--data", tmp_path, "--output", tmp_path / "out", "--no-progress")
    assert finished.exit_code == 0, finished.output
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["dataset"]["rows"] == {"train": 50, "validation": 10, "test": 20}
    assert result["reloaded"]["same"]
    assert str(tmp_path) not in json.dumps(result)


def test_a_failed_run_leaves_the_folder_free(tmp_path):
    refused = run("train", "training.lr_scheduler_type=magic", "--output", tmp_path / "a" / "b")
    assert refused.exit_code == 2
    assert not (tmp_path / "a").exists()


def test_same_seed_same_model(tmp_path):
    for name in ("a", "b"):
        assert run("train", *QUICK, "--output", tmp_path / name, "--no-progress").exit_code == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_default_output_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run("train", *QUICK, "--no-progress").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits-plmu", "digits-plmu-2"]


def test_a_damaged_model_is_named(trained, tmp_path):
    folder, _ = trained
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 40)
    finished = run("evaluate", tmp_path)
    assert finished.exit_code == 2
    assert "could not be loaded" in finished.stderr


def test_version_and_help():
    import lmu_hf

    assert run("--version").stdout.strip() == lmu_hf.__version__
    assert "train" in run("--help").stdout


def test_digits_task_ships_its_config():
    assert load_task("digits").dataset["id"] == "sklearn/digits"
