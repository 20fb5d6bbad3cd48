"""Trainers that publish: what they send, that no secret is in it, and that a Hub out of order does not stop a training."""

import json
import logging

import pytest
import torch
from hub_server import ADA
from huggingface_hub import ModelCard
from transformers import Trainer, TrainingArguments

from lmu_hf import LMUConfig, LMUFeatureExtractor, LMUForSequenceClassification, LMUForTimeSeriesPrediction
from lmu_hf.errors import HubError
from lmu_hf.trainer import LMUTrainer

PARTS = {"train_dataset": 24, "eval_dataset": 12}


@pytest.fixture
def make(hub, tmp_path, monkeypatch):
    """Makes a trainer of one of the classes, which publishes under the name of its folder."""
    monkeypatch.setattr("lmu_hf.card.run_example", lambda *arguments: "1: 0.981")

    def make(cls, name="waves", **settings):
        torch.manual_seed(0)
        rows = [{"input_values": torch.randn(20, 1), "labels": index % 2} for index in range(24)]
        config = LMUConfig(order=4, theta=20, hidden_size=4, num_labels=2, problem_type="single_label_classification")
        arguments = TrainingArguments(
            **{
                "output_dir": str(tmp_path / name),
                "push_to_hub": True,
                "num_train_epochs": 2,
                "per_device_train_batch_size": 8,
                "eval_strategy": "epoch",
                "save_strategy": "epoch",
                "logging_strategy": "epoch",
                "learning_rate": 0.005,
                "disable_tqdm": True,
                "use_cpu": True,
                **settings,
            }
        )
        return cls(
            model=LMUForSequenceClassification(config),
            args=arguments,
            processing_class=LMUFeatureExtractor(),
            **{part: rows[:count] for part, count in PARTS.items()},
        )

    return make


def everything(repo):
    """All files of all commits: what was sent once stays in the history."""
    return {(sha, name): content for sha, files in repo.commits.items() for name, content in files.items()}


def test_lmu_trainer(hub, make, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    trainer = make(LMUTrainer, hub_token=ADA, hub_private_repo=True)
    trainer.train()
    assert set(hub.files("ada/waves")) >= {"config.json", "model.safetensors", "modeling_lmu.py"}  # every save
    published = trainer.push_to_hub(dataset="bob/waves", license="mit", tags=["waves"])
    assert published.url == f"{hub.url}/ada/waves"
    assert hub.repos["ada/waves"].private

    for (_, name), content in everything(hub.repos["ada/waves"]).items():
        assert not name.endswith((".bin", ".pt", ".pth")), name
        assert "checkpoint" not in name
        assert ADA.encode() not in content, name
        assert str(tmp_path).encode() not in content, name
    for path in tmp_path.rglob("*.bin"):
        raise AssertionError(f"{path} was kept")

    card = hub.files("ada/waves")["README.md"].decode()
    data = ModelCard(card).data
    assert (data.license, data.base_model, data.datasets) == ("mit", None, ["bob/waves"])
    assert "waves" in data.tags
    assert "fine-tuned" not in card
    (loss,) = [entry.metric_value for entry in data.eval_results if entry.metric_type == "loss"]
    assert loss == [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log][-1]
    for fact in (
        "learning_rate: 0.005",
        "num_train_epochs: 2",
        "24 train, 12 validation",
        "learning_curve.png",
        "for 2 epochs in",
    ):
        assert fact in card, fact
    monkeypatch.setenv("HF_TOKEN", ADA)
    loaded = LMUForSequenceClassification.from_pretrained("ada/waves", cache_dir=tmp_path / "cache")
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)


def test_whole_checkpoints_are_refused(make):
    for strategy in ("checkpoint", "all_checkpoints"):
        with pytest.raises(ValueError, match="state of the optimizer"):
            make(LMUTrainer, hub_strategy=strategy)


def test_training_goes_on_without_the_hub(hub, make, caplog):
    trainer = make(LMUTrainer)
    hub.fail("POST", "preupload", 500, times=1000)
    with caplog.at_level(logging.WARNING, "lmu_hf.trainer"):
        trainer.train()
    assert trainer.state.epoch == 2
    assert "was not published: hub: failed with 500" in caplog.text
    with pytest.raises(HubError, match="second try"):
        trainer.push_to_hub()
    hub.failures.clear()
    trainer.push_to_hub()
    assert "model.safetensors" in hub.files("ada/waves")


def test_a_best_model_is_described_as_such(make):
    trainer = make(LMUTrainer, push_to_hub=False, load_best_model_at_end=True, metric_for_best_model="loss")
    trainer.train()
    record = trainer.record()
    losses = {log["epoch"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert record["scores"]["validation"]["loss"] == min(losses.values()) == losses[record["best_epoch"]]
    json.dumps(record)


def test_plain_trainer(hub, make, tmp_path):
    """transformers' own, logged in as one should be: the model arrives whole, and no token with it."""
    trainer = make(Trainer, name="plain")
    trainer.train()
    trainer.push_to_hub()
    assert not any(ADA.encode() in content for content in everything(hub.repos["ada/plain"]).values())
    assert {"model.safetensors", "modeling_lmu.py", "preprocessor_config.json"} <= set(hub.files("ada/plain"))
    assert LMUForSequenceClassification.from_pretrained("ada/plain", cache_dir=tmp_path / "cache").config.order == 4


@pytest.mark.parametrize("steps", [1, 4])
def test_losses_of_time_series_are_means_over_what_is_known(steps, tmp_path):
    """Accumulated or not, in training and evaluation: the loss of one large batch, whatever is missing in which part."""
    torch.manual_seed(0)
    model = LMUForTimeSeriesPrediction(LMUConfig(order=4, theta=20, hidden_size=4, kernel_regularizer="l2"))
    series, mask = torch.randn(8, 12, 1), torch.arange(12) < torch.tensor([12, 3, 7, 12, 5, 2, 9, 4])[:, None]
    labels = model.targets(series, mask)
    labels[3, 4:] = torch.nan
    # Padding is left out even where it has labels.
    labels = torch.where(mask[..., None], labels, torch.full_like(labels, 7.0))
    batch = {"input_values": series, "attention_mask": mask.long(), "labels": labels}
    expected = model(**batch).loss
    rows = [{name: value[index] for name, value in batch.items()} for index in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=8 // steps,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=steps,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = LMUTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)
    trainer.train()
    (loss,) = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert loss == pytest.approx(expected.item(), rel=1e-5)
