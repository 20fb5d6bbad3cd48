"""Configuration and models in transformers' conventions. Padding, precision and saving are the ones that bite."""

import json

import numpy as np
import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import CONFIGS, config, inputs
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

from lmu_hf import LMU, LMUConfig, LMUForSequenceClassification, LMUModel


def build(name, **kwargs):
    return tiny.build(LMUForSequenceClassification, name, **kwargs)


def test_papers_parameter_counts():
    lmu = LMUConfig(
        memory_d=1,
        order=256,
        theta=784,
        hidden_cell={"name": "rnn", "use_bias": False},
        hidden_size=212,
        hidden_to_memory=True,
        memory_to_memory=True,
        input_to_hidden=True,
        num_labels=10,
    )
    assert LMUForSequenceClassification(lmu).num_parameters() == 102_027
    example = LMUConfig(input_to_hidden=True, kernel_initializer="ones", num_labels=10)
    assert LMUForSequenceClassification(example).num_parameters() == 101_771
    plmu = LMUConfig(
        order=468,
        hidden_cell="dense",
        hidden_act="relu",
        hidden_size=346,
        input_to_hidden=True,
        encoder_act="relu",
        use_bias=True,
        num_labels=10,
    )
    assert LMUForSequenceClassification(plmu).num_parameters() == 166_092


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_bit_for_bit(name, tmp_path):
    model = build(name)
    batch = inputs(model)
    model.save_pretrained(tmp_path)
    for cls in (LMUForSequenceClassification, AutoModelForSequenceClassification):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is LMUForSequenceClassification
        assert not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is LMUModel
    assert torch.equal(base(**batch).pooler_output, model.model(**batch).pooler_output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_load_keeps_the_memory_exact(name, dtype, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    half = LMUForSequenceClassification.from_pretrained(tmp_path, dtype=dtype)
    for block, exact in zip(half.model.layers, model.model.layers, strict=True):
        assert torch.equal(block.lmu.cell.A, exact.lmu.cell.A)
        assert torch.equal(block.lmu.cell.theta, exact.lmu.cell.theta)
        if block.lmu.cell.theta_inv is not None:
            assert block.lmu.cell.theta_inv.dtype == torch.float32
    batch = inputs(half)
    logits = half(**batch).logits
    assert logits.dtype == dtype
    # 8 or 11 bits per rounding, logits of order 1 after two to four layers.
    assert (logits.float() - model(**batch).logits).abs().max() < 0.1


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_never_changes_a_row(name, side):
    model = build(name)
    batch = inputs(model)
    key, values = next(iter(batch.items()))
    steps = values.shape[1]
    lengths = torch.tensor([steps, 6, 1, 9])
    if side == "holes":
        mask = torch.rand(4, steps).argsort(1) < lengths[:, None]
    else:
        position = torch.arange(steps)
        mask = position < lengths[:, None] if side == "right" else position >= steps - lengths[:, None]
    poisoned = values.clone()
    poisoned[~mask] = 7 if key == "input_ids" else torch.nan
    outputs = model(**{key: poisoned}, attention_mask=mask.long(), output_hidden_states=True)
    for row in range(4):
        alone = model(**{key: values[row : row + 1, mask[row]]}, output_hidden_states=True)
        # The same float32 sums in another order.
        assert (outputs.logits[row] - alone.logits[0]).abs().max() < 2e-6
        for together, single in zip(outputs.hidden_states[1:], alone.hidden_states[1:], strict=True):
            assert (together[row, mask[row]] - single[0]).abs().max() < 2e-6
            assert (together[row, ~mask[row]] == 0).all()
    assert (model(**{key: poisoned}, attention_mask=mask).logits - outputs.logits).abs().max() < 2e-6
    outputs.logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_and_last_step_agree(name):
    model = build(name)
    batch = inputs(model)
    outputs = model.model(**batch, output_hidden_states=True)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    assert outputs.last_hidden_state.shape == (4, 15, model.config.output_size)
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    if model.config.pooling == "last" and not model.config.bidirectional:
        last = model.model(**batch, return_sequences=False)
        assert last.last_hidden_state.shape == (4, 1, model.config.output_size)
        assert (last.pooler_output - outputs.pooler_output).abs().max() < 2e-6
    assert isinstance(model(**batch, return_dict=False), tuple)


@pytest.mark.parametrize("name", CONFIGS)
def test_algorithms_agree(name):
    model = build(name).double()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in inputs(model).items()}
    expected = model(**batch).logits
    coupled = model.model.layers[0].lmu.cell.coupled
    for algorithm in ("naive",) if coupled else ("naive", "chunked", "fft"):
        model.set_algorithm(algorithm)
        # theta_inv and A, B are float64 here; only the order of sums differs.
        assert (model(**batch).logits - expected).abs().max() < 1e-10
    model.set_algorithm("auto")
    if coupled:
        with pytest.raises(ValueError, match="feed the state back"):
            model.set_algorithm("fft")
        assert model.model.layers[0].lmu.algorithm == "auto"


@pytest.mark.parametrize(
    ("problem_type", "labels", "num_labels"),
    [
        ("single_label_classification", torch.tensor([0, 2, 1, 1]), 3),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1]] * 4), 3),
        ("regression", torch.randn(4), 1),
        ("regression", torch.randn(4, 3), 3),
    ],
)
def test_problem_types_and_accumulation(problem_type, labels, num_labels):
    model = build("dense", problem_type=problem_type, num_labels=num_labels, kernel_regularizer="l2", classifier_dropout=0.0)
    batch = inputs(model)
    logits = model(**batch).logits
    penalty = model.regularization_loss()
    assert penalty > 0
    expected = {
        "single_label_classification": torch.nn.functional.cross_entropy,
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
        "regression": torch.nn.functional.mse_loss,
    }[problem_type](logits, labels.reshape(logits.shape) if labels.is_floating_point() else labels)
    whole = model(**batch, labels=labels).loss
    assert torch.allclose(whole, expected + penalty, rtol=1e-6)
    # Two accumulation steps, as the Trainer runs them, give the loss of the whole batch, the penalty counted once.
    items = torch.tensor(labels.numel())
    halves = [
        model(**{key: value[rows] for key, value in batch.items()}, labels=labels[rows], num_items_in_batch=items).loss
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert torch.allclose(sum(halves), whole, rtol=1e-6)
    inferred = build("dense", num_labels=num_labels, kernel_regularizer="l2")
    if num_labels == 1 or problem_type != "regression":
        assert torch.allclose(inferred(**batch, labels=labels).loss, whole, rtol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = build("residual", residual_dropout=0.0).train()
    batch = inputs(model)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_trainer_trains(tmp_path):
    model = build("signal", num_labels=2)
    rows = [{"input_values": torch.randn(12, 2) + label, "labels": label} for label in [0, 1] * 16]
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=12, learning_rate=0.02, report_to="none", disable_tqdm=True, use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before


CELLS = ["rnn", "lstm", "gru", "dense", "readout", [{"name": "lstm", "hidden_size": 4}, "dense"]]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_weights_that_a_checkpoint_lacks_are_initialised(cell, tmp_path, monkeypatch):
    """transformers allocates them uninitialised; poisoned here, so that a forgotten one shows as NaN."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(empty_like(*a, **k)))
    model = build("signal", hidden_cell=cell, memory_d=2)
    everything = model.state_dict()
    for key in everything:
        model.save_pretrained(tmp_path, state_dict={name: value for name, value in everything.items() if name != key})
        loaded = LMUForSequenceClassification.from_pretrained(tmp_path)
        for name, value in loaded.state_dict().items():
            assert value.isfinite().all(), (key, name)
            assert name == key or torch.equal(value, everything[name]), (key, name)
        forget = "hidden_cell.bias" if cell == "lstm" else None
        if forget is not None and key.endswith(forget):
            assert loaded.state_dict()[key].tolist() == [0.0] * 8 + [1.0] * 8 + [0.0] * 16
    wider = LMUForSequenceClassification.from_pretrained(tmp_path, order=9, ignore_mismatched_sizes=True)
    assert all(value.isfinite().all() for value in wider.state_dict().values())


def _poison(tensor):
    return tensor.fill_(torch.nan) if tensor.is_floating_point() and not tensor.is_meta else tensor


class Stubborn(torch.nn.Module):
    """A cell whose initialisation writes its weight without asking."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size, self.output_size, self.state_sizes = input_size, hidden_size, (hidden_size,)
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, input_size))
        self.reset_parameters()

    def reset_parameters(self):
        with torch.no_grad():
            self.weight.copy_(torch.randn(self.weight.shape))

    def forward(self, z, state):
        y = z @ self.weight.T + state[0]
        return y, (y,)


def test_a_cell_of_the_users_keeps_its_loaded_weights(tmp_path):
    from lmu_hf.model import cell_registry

    cell_registry.register_hidden_cell("stubborn", Stubborn)
    try:
        model = build("signal", hidden_cell="stubborn")
        model.save_pretrained(tmp_path)
        loaded = LMUForSequenceClassification.from_pretrained(tmp_path, use_bias=True)
        key = "model.layers.0.lmu.cell.hidden_cell.weight"
        assert torch.equal(loaded.state_dict()[key], model.state_dict()[key])
    finally:
        del cell_registry._REGISTRY["stubborn"]


def test_mean_pooling_does_not_overflow_in_half_precision():
    model = build("memory", pooling="mean", order=1, theta=1.0, kernel_initializer="ones").half()
    values = torch.full((2, 4000, 2), 30.0, dtype=torch.float16)
    mask = torch.ones(2, 4000)
    mask[1, 100:] = 0
    assert model(input_values=values, attention_mask=mask).logits.isfinite().all()


@pytest.mark.parametrize("labels", [torch.zeros(3, 4), torch.zeros(12), torch.zeros(4, 1)])
def test_labels_of_another_shape_are_refused(labels):
    model = build("dense", problem_type="regression")
    with pytest.raises(ValueError, match=r"labels: expected .4, 3. for regression, found"):
        model(**inputs(model), labels=labels)


def test_int32_labels():
    model = build("dense")
    batch = inputs(model)
    labels = torch.tensor([0, 2, 1, 1])
    assert model(**batch, labels=labels.int()).loss == model(**batch, labels=labels).loss


def test_backwards_layers_all_run_from_the_end():
    model = build("backwards")
    values = torch.randn(1, 9, 2)
    mirrored = build("signal", num_hidden_layers=2)
    mirrored.load_state_dict(model.state_dict())
    assert (mirrored(input_values=values.flip(1)).logits - model(input_values=values).logits).abs().max() < 1e-6


def test_last_step_only_by_configuration():
    model, last = build("dense").model, build("dense", return_sequences=False).model
    values = torch.randn(3, 6, 2)
    assert last(input_values=values).last_hidden_state.shape == (3, 1, 8)
    assert torch.equal(last(input_values=values, return_sequences=True).last_hidden_state, model(input_values=values)[0])


def test_last_step_only_is_refused_where_pooling_needs_all():
    model = build("mean").model
    with pytest.raises(ValueError, match="'mean' pooling needs every step"):
        model(input_values=torch.randn(1, 4, 2), return_sequences=False)


def test_inputs_embeds_equal_tokens():
    model = build("tokens")
    ids = torch.randint(1, 11, (2, 7))
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(input_ids=ids).logits, model(inputs_embeds=embeds).logits)
    assert model.main_input_name == "input_ids"


def test_one_channel_needs_no_channel_axis():
    model = build("signal", input_size=1)
    x = torch.randn(2, 9)
    assert torch.equal(model(input_values=x).logits, model(input_values=x[..., None]).logits)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "expected input_values or inputs_embeds, found no input"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, "found .'input_ids'"),
        (
            {"input_values": torch.zeros(2, 3, 2), "inputs_embeds": torch.zeros(2, 3, 2)},
            "found .'input_values', 'inputs_emb",
        ),
        ({"input_values": torch.zeros(2, 3, 5)}, "input_size=2.* found .2, 3, 5."),
        ({"input_values": torch.zeros(2, 3)}, "input_size=2"),
        ({"input_values": torch.zeros(2, 0, 2)}, "time >= 1"),
        ({"input_values": torch.zeros(2, 3, 2), "attention_mask": torch.ones(2, 4)}, "attention_mask: expected"),
    ],
)
def test_wrong_inputs(given, message):
    with pytest.raises(ValueError, match=message):
        build("signal")(**given)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"order": 0}, "order: expected a whole number"),
        ({"theta": -1.0}, "theta: expected a positive"),
        ({"theta": [1.0, 2.0]}, "memory_d=1 values, found 2"),
        ({"theta": [[1.0], [2.0]]}, "one list for each of the 1 layers"),
        ({"hidden_cell": "transformer"}, "hidden_cell: expected one of"),
        ({"hidden_cell": None, "hidden_to_memory": True}, "hidden_to_memory: expected a hidden cell"),
        ({"poolin": "last"}, "poolin: not a field of LMUConfig; did you mean 'pooling'"),
        ({"pooling": "first"}, "pooling: expected one of"),
        ({"block_type": "dense"}, "block_type: expected one of"),
        ({"problem_type": "ranking"}, "problem_type: expected one of"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected"),
        ({"classifier_dropout": 1.0}, "classifier_dropout: expected a rate"),
        ({"block_type": "residual", "hidden_size": None}, "hidden_size: residual blocks need"),
        ({"block_type": "residual", "go_backwards": True}, "go_backwards: the output would not line up"),
        ({"block_type": "residual", "bidirectional": True}, "pooling: at the last step"),
        ({"discretizer": "euler"}, "smallest stable theta"),
        ({"num_hidden_layers": 2, "kernel_initializer": None}, "needs memory_d=212"),
        ({"return_state": True}, "return_state: an argument of the layer"),
        ({"return_sequences": False, "pooling": "mean"}, "return_sequences: False needs pooling='last'"),
        ({"id2label": {0: "a", 2: "b"}}, "id2label: expected a name for each"),
        ({"vocab_size": 5, "pad_token_id": 5}, "pad_token_id: expected a token below"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon: expected"),
    ],
)
def test_wrong_configurations(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LMUConfig(**kwargs)


@pytest.mark.parametrize("kwargs", [{"order": 4.0}, {"order": "4"}, {"trainable_theta": "yes"}, {"hidden_size": 1.5}])
def test_wrong_types(kwargs):
    with pytest.raises(StrictDataclassError, match=next(iter(kwargs))):
        LMUConfig(**kwargs)


def test_theta_of_any_number_type_can_be_saved(tmp_path):
    for theta in (np.float32(20), (20.0,), [np.float64(20)]):
        config("signal", theta=theta if not isinstance(theta, np.floating) else [theta]).save_pretrained(tmp_path)
        assert LMUConfig.from_pretrained(tmp_path).theta == [20.0]


def test_a_config_changed_for_the_worse_is_not_saved(tmp_path):
    changed = config("signal")
    changed.order = -1
    with pytest.raises(StrictDataclassError, match="order: expected"):
        changed.save_pretrained(tmp_path)


def test_unknown_keys_of_newer_files_are_kept(tmp_path):
    config("signal").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "a_later_setting": 3}))
    assert LMUConfig.from_pretrained(tmp_path).a_later_setting == 3


def test_a_model_without_parameters():
    """The memory of the input itself: nothing to learn, and no parameter to tell dtype and device."""
    model = LMUModel(LMUConfig(order=8, theta=20, hidden_cell=None, kernel_initializer=None))
    assert not list(model.parameters())
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    x = torch.randn(2, 9, 1)
    found = model(input_values=x).last_hidden_state
    layer = LMU(1, 1, 8, 20, kernel_initializer=None, return_sequences=True)
    assert torch.equal(found, layer(x))
    streamer = model.streamer(2)
    torch.testing.assert_close(streamer.feed(x), found[:, -1], rtol=0, atol=1e-6)
    assert model.regularization_loss() == 0
