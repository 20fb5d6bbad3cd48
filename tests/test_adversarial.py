"""Adversarial training: where rows are moved to, what is minimized, and that all else of a run goes along with it."""

import json
import signal

import killed
import pytest
import torch
from test_running import CONFIG, arguments, assert_same, unbroken

from lmu_hf import LMUConfig, LMUForSequenceClassification, LMUForTimeSeriesPrediction
from lmu_hf.adversarial import LMUTrainingArguments, steepest_step
from lmu_hf.errors import InputError
from lmu_hf.experiment import Experiment
from lmu_hf.trainer import LMUTrainer
from lmu_hf.training import train

SMALL = {"order": 6, "theta": 20, "hidden_size": 5, "num_labels": 3, "problem_type": "single_label_classification"}


def batch(rows=8):
    torch.manual_seed(1)
    mask = torch.ones(rows, 20, dtype=torch.int64)
    mask[0, :7] = 0
    values = torch.randn(rows, 20, 1)
    values[0, :7] = float("nan")  # whatever padding holds
    return {"input_values": values, "attention_mask": mask, "labels": torch.arange(rows) % 3}


def trainer(tmp_path, cls=LMUForSequenceClassification, model=None, **settings):
    torch.manual_seed(0)
    config = LMUConfig(**{**SMALL, **(model or {})})
    arguments = LMUTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)
    return LMUTrainer(model=cls(config).train(), args=arguments)


def test_step_has_the_length_and_the_direction_of_the_gradient():
    torch.manual_seed(0)
    weights, x = torch.randn(4, 6, 2), torch.randn(4, 6, 2, requires_grad=True)
    weights[1] = 0
    weights[2] *= 1e-30  # its square is no float32
    step = steepest_step((weights * x).sum(), x, 0.7, keep_graph=False)
    torch.testing.assert_close(step.flatten(1).norm(dim=1), torch.tensor([0.7, 0.0, 0.7, 0.7]))
    direction = torch.nn.functional.normalize(weights.flatten(1).double(), eps=1e-60).float()
    cosine = (step.flatten(1) * direction).sum(1) / 0.7
    torch.testing.assert_close(cosine, torch.tensor([1.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_that_of_rows_and_moved_rows(tmp_path, weight, smoothing):
    ours = trainer(tmp_path, adversarial_radius=0.8, adversarial_weight=weight, label_smoothing_factor=smoothing)
    inputs = batch()
    loss = ours.compute_loss(ours.model, inputs)
    assert "labels" in inputs, "the caller's batch stays as it is"

    def mean(values):
        logits = ours.model(**{**inputs, "input_values": values}).logits
        return torch.nn.functional.cross_entropy(logits, inputs["labels"], label_smoothing=smoothing)

    values = inputs["input_values"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mean(values), values)
    assert not gradient[0, :7].any(), "padding does not count"
    moved = values.detach() + 0.8 * gradient / gradient.norm(dim=1, keepdim=True)
    before, after = mean(inputs["input_values"]), mean(moved)
    assert after > before
    torch.testing.assert_close(loss, (1 - weight) * before + weight * after)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in ours.model.parameters())
    ours.model.eval()
    torch.testing.assert_close(ours.compute_loss(ours.model, inputs), before)  # no moved rows where it is scored


@pytest.mark.parametrize(
    "model",
    [
        {"hidden_cell": "lstm", "hidden_to_memory": True, "memory_to_memory": True},
        {"hidden_cell": "dense", "encoder_act": "relu"},
        {"block_type": "residual", "num_hidden_layers": 2, "hidden_cell": "readout", "memory_d": 5, "pooling": "mean"},
    ],
    ids=["coupled", "parallel", "residual"],
)
def test_accumulated_batches_are_one_large_batch(tmp_path, model):
    ours = trainer(tmp_path, model=model, adversarial_radius=0.5)
    inputs = batch()
    ours.compute_loss(ours.model, inputs, num_items_in_batch=8).backward()
    whole = {name: p.grad.clone() for name, p in ours.model.named_parameters()}
    ours.model.zero_grad()
    for start in (0, 3):
        part = {name: value[start : start + (3 if start == 0 else 5)] for name, value in inputs.items()}
        ours.compute_loss(ours.model, part, num_items_in_batch=8).backward()
    for name, p in ours.model.named_parameters():
        # float32 sums in another order, through the direction of a gradient.
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_time_series(tmp_path):
    ours = trainer(tmp_path, LMUForTimeSeriesPrediction, adversarial_radius=0.5)
    values = torch.randn(4, 20, 1)
    inputs = {"input_values": values, "labels": ours.model.targets(values)}
    moved = ours.compute_loss(ours.model, inputs)
    assert moved > ours.model(**inputs).loss


def test_tokens_cannot_be_moved(tmp_path):
    ours = trainer(tmp_path, model={"vocab_size": 9}, adversarial_radius=0.5)
    with pytest.raises(InputError, match=r"adversarial_radius: expected signals .* found \['input_ids', 'labels'\]"):
        ours.compute_loss(ours.model, {"input_ids": torch.ones(2, 5, dtype=torch.int64), "labels": torch.tensor([0, 1])})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adversarial_radius": -1}, "training.adversarial_radius: expected a number >= 0, found -1"),
        ({"adversarial_radius": "far"}, "training.adversarial_radius: expected a number >= 0, found 'far'"),
        ({"adversarial_radius": 1, "adversarial_weight": 0}, "training.adversarial_weight: expected a number > 0, found 0"),
        (
            {"adversarial_radius": 1, "adversarial_weight": 1.5},
            r"adversarial_weight: expected a number in \(0, 1\], found 1.5",
        ),
        ({"adversarial_weight": 0.5}, "adversarial_weight: weighs nothing without training.adversarial_radius"),
        ({"adversarial_radius": 1, "torch_compile": True}, "adversarial_radius: .* leave out torch_compile"),
        ({"adversarial_raduis": 1}, "did you mean 'adversarial_radius'"),
    ],
)
def test_errors(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        train(Experiment.from_dict({**CONFIG, "training": settings}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    settings = {"adversarial_radius": 1.0, "adversarial_weight": 0.4, "num_train_epochs": 3}
    config, whole = unbroken(tmp_path, **settings)
    assert killed.run(arguments(config, tmp_path / "run"), "optimizer half written") == -signal.SIGKILL
    assert killed.run(arguments(config, tmp_path / "run")) == 0
    assert_same(tmp_path / "run", whole)
    result = json.loads((whole / "result.json").read_text())
    assert result["experiment"]["training"]["adversarial_radius"] == 1.0
    LMUForSequenceClassification.from_pretrained(whole)
    # The clean loss of the same weights is what is scored; that of training includes the moved rows.
    plain = train(Experiment.read(config, ["training.adversarial_radius=0.0001"]), tmp_path / "plain", progress=False)
    assert plain["history"][0]["train_loss"] < result["history"][0]["train_loss"]
