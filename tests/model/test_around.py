"""What people put around a model: adapters, quantised weights, weights that lie elsewhere."""

import importlib
import os
import sys
from pathlib import Path

import processes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import build, inputs, labels

from lmu_hf import (
    LMUCache,
    LMUForCausalLM,
    LMUForSequenceClassification,
    LMUForTimeSeriesPrediction,
    LMUForTokenClassification,
)

HEADS = (LMUForSequenceClassification, LMUForTokenClassification, LMUForCausalLM, LMUForTimeSeriesPrediction)
TASKS = {
    LMUForSequenceClassification: "SEQ_CLS",
    LMUForTokenClassification: "TOKEN_CLS",
    LMUForCausalLM: "CAUSAL_LM",
    LMUForTimeSeriesPrediction: None,
}
TORCHAO = Path(sys.prefix) / "test-material" / "torchao"


@pytest.mark.parametrize("cls", HEADS)
def test_lora_trains_saves_and_reloads(cls, tmp_path):
    base = build(cls, "residual_last")
    batch, targets = inputs(base), labels(base)
    frozen = {key: value.clone() for key, value in base.state_dict().items()}
    # PEFT trains and saves a head as a whole; of a tagger's it has to be told.
    whole = ["score"] if cls is LMUForTokenClassification else None
    settings = LoraConfig(r=2, target_modules="all-linear", exclude_modules=whole, task_type=TASKS[cls])
    model = get_peft_model(base, settings)
    trained = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name}
    # Every linear part of each block and the projection of the inputs.
    assert len(trained) >= 2 * 4 + 1
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(model(**batch, labels=targets).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    model.eval().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model*.safetensors"))

    fresh = build(cls, "residual_last")
    assert all(torch.equal(frozen[key], value) for key, value in fresh.state_dict().items())
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    expected = model(**batch)[0]
    assert torch.equal(loaded(**batch)[0], expected)
    merged = loaded.merge_and_unload()
    # One product of the sum in place of the sum of two products.
    torch.testing.assert_close(merged(**batch)[0], expected, rtol=0, atol=1e-5)
    if cls is LMUForCausalLM:
        tokens = batch["input_ids"][:, :5]
        assert torch.equal(model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False)[:, :5], tokens)


def test_lora_of_a_hidden_cell_is_refused_by_peft():
    """A recurrent cell keeps its weights as plain parameters; adapters are for linear modules."""
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(build(LMUForSequenceClassification, "signal"), LoraConfig(target_modules=["hidden_cell"]))


def test_layers_beside_adapters_are_trained_whole(tmp_path):
    base = build(LMUForSequenceClassification, "residual_last")
    batch = inputs(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["out_proj"], modules_to_save=["lmu"]))
    model(**batch, labels=labels(base)).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if ".lmu." in name and p.requires_grad]
    assert grads
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("name", ["signal", "dense", "coupled"])
def test_plain_stacks_are_trained_whole_beside_an_adapted_head(name, tmp_path):
    """With a task type PEFT trains the head whole and finds no other linear layer; without one it adapts the head."""
    with pytest.raises(ValueError, match="No modules were targeted"):
        get_peft_model(
            build(LMUForSequenceClassification, name), LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
        )
    base = build(LMUForSequenceClassification, name)
    batch, targets = inputs(base), labels(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["score"], modules_to_save=["lmu"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch, labels=targets).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    fresh = build(LMUForSequenceClassification, name)
    before = fresh(**batch).logits
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert (loaded(**batch).logits - before).abs().max() > 1e-3
    # The layers came along, not only the head's adapter.
    with loaded.disable_adapter():
        torch.testing.assert_close(loaded(**batch).logits, before, rtol=0, atol=0)


@pytest.fixture
def torchao(monkeypatch):
    """torchao, which is kept apart from the environment."""
    if not TORCHAO.exists():
        message = "torchao is not there; run scripts/fetch_test_material"
        pytest.fail(message) if os.environ.get("LMU_HF_ALL_TESTS") else pytest.skip(message)
    monkeypatch.syspath_prepend(str(TORCHAO))
    return importlib.import_module("torchao.quantization")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("name", ["residual", "residual_last", "signal"])
@pytest.mark.parametrize("cls", HEADS)
def test_torchao_quantises_the_linear_layers(torchao, cls, name, kind):
    model = build(cls, name)
    batch = inputs(model)
    expected = model(**batch)[0]
    torchao.quantize_(model, getattr(torchao, kind)())
    quantised = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert quantised
    assert all("Int8" in type(module.weight).__name__ for module in quantised)
    found = model(**batch)[0]
    # 8 bits per weight, and per activation, through up to ten layers.
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()
    if cls is LMUForCausalLM:
        cache = LMUCache(model.config.num_hidden_layers)
        for t in range(15):
            step = model(input_ids=batch["input_ids"][:, t : t + 1], past_key_values=cache).logits
        assert (step[:, 0] - found[:, -1]).abs().max() < 0.1 * expected.abs().max()


QUANTISED = """
import sys, torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import TorchAoConfig
from lmu_hf import LMUForSequenceClassification

folder, x = sys.argv[1], torch.randn(2, 9, 2)
load = LMUForSequenceClassification.from_pretrained
model = load(folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32)
assert type(model.score.weight).__name__ == "Int8Tensor"
found, expected = model(input_values=x).logits, load(folder)(input_values=x).logits
assert (found - expected).abs().max() < 0.1 * expected.abs().max()
model.save_pretrained(folder + "/again")
assert torch.equal(load(folder + "/again")(input_values=x).logits, found)
"""


def test_quantised_checkpoints(torchao, tmp_path):
    """In a process of its own: transformers looks for torchao once."""
    build(LMUForSequenceClassification, "residual_last").save_pretrained(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(TORCHAO)}
    done = processes.run([sys.executable, "-c", QUANTISED, str(tmp_path)], env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["signal", "coupled", "dense", "memory", "residual", "trained_theta", "mean"])
def test_offloaded_weights_are_brought_in(name, tmp_path):
    model = build(LMUForSequenceClassification, name)
    model.save_pretrained(tmp_path / "model")
    batch = inputs(model)
    places = {"model": "cpu", "model.layers": "disk", "dropout": "cpu", "score": "cpu"}
    for part in ("model.norm", "model.input_proj"):
        if model.config.block_type == "residual":
            places[part] = "cpu"
    del places["model"]
    loaded = LMUForSequenceClassification.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    for _ in range(2):
        assert all(p.is_meta for p in loaded.model.layers[0].lmu.parameters())
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
