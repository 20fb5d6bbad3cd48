"""Every head with every configuration: saving, padding, training, precision, and what belongs to tokens only."""

import pytest
import torch
from made_data import tokenizer
from tiny import CLASSES, EVERY, build, config, cut, inputs, labels, padding, poison
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from lmu_hf import (
    LMUConfig,
    LMUForCausalLM,
    LMUForSequenceClassification,
    LMUForTimeSeriesPrediction,
    LMUForTokenClassification,
    LMUModel,
)

AUTO = {
    LMUForSequenceClassification: AutoModelForSequenceClassification,
    LMUForTokenClassification: AutoModelForTokenClassification,
    LMUForCausalLM: AutoModelForCausalLM,
    LMUForTimeSeriesPrediction: AutoModelForTimeSeriesPrediction,
}
STEPWISE = (LMUForTokenClassification, LMUForCausalLM, LMUForTimeSeriesPrediction)
HEADS = [(cls, name) for cls, name in EVERY if cls is not LMUModel]


def ids(value):
    return value.__name__ if isinstance(value, type) else value


def result(outputs):
    """What a head predicts."""
    return outputs.predictions if "predictions" in outputs else outputs.logits


@pytest.mark.parametrize(("cls", "name"), HEADS, ids=ids)
def test_round_trip_bit_for_bit(cls, name, tmp_path):
    model = build(cls, name)
    batch = inputs(model)
    model.save_pretrained(tmp_path, max_shard_size=200)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or name == "memory"
    for loaded in (AUTO[cls].from_pretrained(tmp_path), cls.from_pretrained(tmp_path, device_map={"": "cpu"})):
        assert type(loaded) is cls
        assert torch.equal(result(loaded(**batch)), result(model(**batch)))
        for block, exact in zip(loaded.model.layers, model.model.layers, strict=True):
            assert torch.equal(block.lmu.cell.A, exact.lmu.cell.A)
            assert torch.equal(block.lmu.cell.B, exact.lmu.cell.B)


def test_a_model_without_weights_comes_back(tmp_path):
    """A memory alone, fed with the signal itself: nothing to store, but nothing to miss either."""
    model = LMUModel(LMUConfig(input_size=2, memory_d=2, order=4, theta=9, hidden_cell=None, kernel_initializer=None))
    assert not model.state_dict()
    x = torch.randn(2, 7, 2)
    model.save_pretrained(tmp_path)
    for loaded in (
        LMUModel.from_pretrained(tmp_path),
        AutoModel.from_pretrained(tmp_path, dtype=torch.float32),
        AutoModel.from_pretrained(tmp_path, device_map={"": "cpu"}),
    ):
        assert torch.equal(loaded(input_values=x).last_hidden_state, model(input_values=x).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("cls", "name"), HEADS, ids=ids)
def test_half_precision(cls, name, dtype, tmp_path):
    model = build(cls, name)
    model.save_pretrained(tmp_path)
    half = cls.from_pretrained(tmp_path, dtype=dtype)
    for block, exact in zip(half.model.layers, model.model.layers, strict=True):
        assert torch.equal(block.lmu.cell.A, exact.lmu.cell.A)
    batch = inputs(half)
    outputs = half(**batch, labels=labels(half))
    assert result(outputs).dtype == dtype
    # 8 or 11 bits per rounding, results of order 1 after two to four layers.
    assert (result(outputs).float() - result(model(**batch))).abs().max() < 0.1
    outputs.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in half.parameters())


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize(("cls", "name"), [pair for pair in HEADS if pair[0] in STEPWISE], ids=ids)
def test_padding_never_changes_a_row(cls, name, side):
    model = build(cls, name)
    batch, targets = inputs(model), labels(model)
    mask = padding(side, 15, [15, 6, 2, 9])
    poisoned = poison(batch, mask)
    outputs = model(**poisoned, attention_mask=mask.long(), labels=targets)
    losses, counts = [], []
    for row in range(4):
        own = targets[row : row + 1, mask[row]]
        alone = model(**cut(batch, slice(row, row + 1), mask[row]), labels=own)
        # The same float32 sums in another order.
        torch.testing.assert_close(result(outputs)[row, mask[row]], result(alone)[0], rtol=0, atol=2e-6)
        losses.append(alone.loss)
        counts.append(own.numel() - (cls is LMUForCausalLM))
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(outputs.loss, mean, rtol=1e-5, atol=0)
    outputs.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("cls", "name"), HEADS, ids=ids)
def test_accumulated_batches_equal_one(cls, name):
    model = build(cls, name, classifier_dropout=0.0, kernel_regularizer=None if name == "residual" else "l2").train()
    batch, targets = inputs(model), labels(model)
    if targets.ndim == 2 and not targets.is_floating_point():
        targets[0, 3:] = -100  # so that the parts count differently
    counted = targets[:, 1:] if cls is LMUForCausalLM else targets
    items = counted.ne(-100).sum()

    def run(parts, **kwargs):
        model.zero_grad()
        total = 0.0
        for rows in parts:
            loss = model(**cut(batch, rows), labels=targets[rows], **kwargs).loss
            loss.backward()
            total += loss.detach()
        return [total, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    whole = run([slice(0, 4)])
    for count in (items, int(items)):
        for found, expected in zip(run([slice(0, 1), slice(1, 4)], num_items_in_batch=count), whole, strict=True):
            # The same float32 sums in another order.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("cls", "name"), HEADS, ids=ids)
def test_gradient_checkpointing_gives_the_same_gradients(cls, name, reentrant):
    model = build(cls, name).train()
    batch, targets = inputs(model), labels(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**batch, labels=targets).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    for key, grad in gradients[0].items():
        assert (grad is None) == (gradients[1][key] is None), key
        assert grad is None or torch.equal(grad, gradients[1][key]), key


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not LMUModel], ids=ids)
def test_trainer_trains(cls, tmp_path):
    model = build(cls, "signal", hidden_cell="lstm")
    torch.manual_seed(0)
    batch, targets = inputs(model, 16), labels(model, 16)
    if cls is LMUForCausalLM:
        targets = batch["input_ids"] = (torch.arange(15) + torch.arange(16)[:, None]) % 10 + 1
    elif cls is LMUForTokenClassification:
        targets = (batch["input_values"][..., 0] > 0).long()
    elif cls is LMUForTimeSeriesPrediction:
        targets = batch["input_values"].flip(2)
    rows = [{**{key: value[row] for key, value in batch.items()}, "labels": targets[row]} for row in range(16)]
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=40,
        learning_rate=0.03,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before


@pytest.mark.parametrize("cls", [LMUForSequenceClassification, LMUForTokenClassification], ids=ids)
@pytest.mark.parametrize("name", ["signal", "mean", "max", "residual"])
def test_classifiers_go_on_from_a_state(cls, name):
    model = build(cls, name)
    batch = inputs(model)
    whole = model(**batch).logits
    first = model(**cut(batch, steps=slice(0, 6)), use_cache=True)
    then = model(**cut(batch, steps=slice(6, 15)), past_key_values=first.past_key_values).logits
    found = then if cls is LMUForSequenceClassification else torch.cat([first.logits, then], dim=1)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


def test_classifiers_return_no_state_unless_asked():
    model = build(LMUForSequenceClassification, "signal")
    assert model(**inputs(model)).past_key_values is None


@pytest.mark.parametrize("cls", [LMUForTokenClassification, LMUForCausalLM], ids=ids)
def test_labels_of_another_shape_are_refused(cls):
    model = build(cls, "signal")
    with pytest.raises(ValueError, match="labels: expected .batch, time.=.4, 15., found .4,"):
        model(**inputs(model), labels=torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("cls", [LMUForSequenceClassification, LMUForTokenClassification, LMUForCausalLM], ids=ids)
def test_resize_of_embeddings(cls, tied, tmp_path):
    model = build(cls, "tokens", input_size=8, tie_word_embeddings=tied)
    batch = inputs(model)
    before = result(model(**batch))
    model.resize_token_embeddings(20, mean_resizing=False)
    assert model.config.vocab_size == 20
    torch.testing.assert_close(result(model(**batch))[..., : before.shape[-1]], before)
    if cls is LMUForCausalLM:
        assert result(model(**batch)).shape[-1] == 20
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert torch.equal(result(loaded(**batch)), result(model(**batch)))
    if cls is LMUForCausalLM:
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize(
    ("cls", "name", "kwargs", "message"),
    [
        (LMUForCausalLM, "signal", {"vocab_size": None, "pad_token_id": None}, "vocab_size: a language model needs"),
        (LMUForCausalLM, "both_ways", {}, "bidirectional: a language model must not see"),
        (LMUForCausalLM, "backwards", {}, "go_backwards: a language model must not see"),
        (LMUForCausalLM, "tokens", {"tie_word_embeddings": True}, "found input_size=5 and an output of 8"),
        (LMUForTimeSeriesPrediction, "tokens", {}, "vocab_size: a time series has values"),
        (LMUForTimeSeriesPrediction, "both_ways", {}, "bidirectional: a prediction at every step"),
    ],
)
def test_configurations_that_do_not_fit_a_head(cls, name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(cls, name, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"horizon": 0}, "horizon: expected a whole number >= 1"),
        ({"prediction_length": 0}, "prediction_length: expected"),
        ({"target_size": 0}, "target_size: expected"),
        ({"prediction_loss": "mae"}, "prediction_loss: expected one of"),
        ({"huber_delta": 0.0}, "huber_delta: expected a positive number"),
    ],
)
def test_wrong_configurations(kwargs, message):
    with pytest.raises(ValueError, match=message):
        config("signal", **kwargs)


TEXT = {"num_hidden_layers": 2, "hidden_size": 16, "input_size": 8, "order": 6, "theta": 12.0, "initializer_range": 0.3}


@pytest.mark.parametrize(
    ("cls", "task", "key"),
    [
        (LMUForSequenceClassification, "text-classification", "label"),
        (LMUForTokenClassification, "token-classification", "entity"),
        (LMUForCausalLM, "text-generation", "generated_text"),
    ],
)
def test_text_pipelines_from_a_folder(cls, task, key, tmp_path):
    words = tokenizer(padding_side="left" if cls is LMUForCausalLM else "right")
    torch.manual_seed(0)
    kwargs = {**TEXT, "vocab_size": len(words), "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    cls(LMUConfig(**kwargs)).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    pipe = pipeline(task, model=str(tmp_path), device="cpu")
    options = {"max_new_tokens": 6, "do_sample": False} if cls is LMUForCausalLM else {}
    texts = ["the cat sees a bird .", "not here", "a big red dog follows the fish or the cat"]
    alone = [pipe(text, **options) for text in texts]
    together = pipe(texts, batch_size=3, **options)
    for a, b in zip(alone, together, strict=True):
        a, b = (value if isinstance(value, list) else [value] for value in (a, b))
        assert [entry[key] for entry in a] == [entry[key] for entry in b]
        if key != "generated_text":
            # The same float32 sums in another order.
            assert all(abs(x["score"] - y["score"]) < 1e-6 for x, y in zip(a, b, strict=True))
