"""torch.compile and torch.export see through the layers, and leave nothing behind that is not real."""

import pytest
import tiny
import torch

from lmu_hf import LMUCache, LMUForCausalLM, LMUForSequenceClassification, LMUModel
from lmu_hf.model import legendre
from lmu_hf.model.layer import LMU

CONFIGS = {
    "memory": {"return_sequences": True},
    "last": {"hidden_cell": "dense", "hidden_size": 4},
    "scales": {"theta": [20.0, 30.0], "hidden_cell": "readout", "return_sequences": True},
}


@pytest.fixture(autouse=True)
def _cold():
    """As in a fresh process: nothing is cached and nothing is compiled."""
    for cache in (legendre.delay_system, legendre.continuous_system, legendre._eigenvalues):
        cache.cache_clear()
    torch._dynamo.reset()


def build(name):
    return LMU(2, 2, 7, **{"theta": 20.0, **CONFIGS[name]})


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("strict", [False, True])
def test_export(name, strict):
    layer, x = build(name), torch.randn(3, 9, 2)
    exported = torch.export.export(layer, (x,), strict=strict).module()
    output = layer(x)
    assert type(output) is torch.Tensor
    assert torch.allclose(exported(x), output, rtol=0, atol=1e-6)
    assert type(build(name)(x)) is torch.Tensor


@pytest.mark.parametrize("name", CONFIGS)
def test_compile_fullgraph(name):
    layer, x = build(name), torch.randn(3, 9, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), layer(x), rtol=0, atol=1e-6)
    mask = torch.ones(3, 9)
    mask[0, 4:] = 0
    assert torch.allclose(compiled(x, mask=mask), layer(x, mask=mask), rtol=0, atol=1e-6)


def test_export_of_a_step():
    cell, x = build("memory").cell, torch.randn(3, 2)
    exported = torch.export.export(cell, (x,)).module()
    assert torch.allclose(exported(x)[0], cell(x)[0], rtol=0, atol=1e-6)


# Heads and bodies know nothing of each other: each body with one head, and each head with one body.
PAIRS = [(LMUForSequenceClassification, name) for name in ("dense", "memory", "residual")] + [
    (cls, "residual_last") for cls in tiny.CLASSES
]


def arguments(model):
    """Padded inputs for a model, with labels if it has a head."""
    given = {**tiny.inputs(model), "attention_mask": tiny.padding("left", 15, [15, 6, 1, 9]), "use_cache": False}
    return given if type(model) is LMUModel else {**given, "labels": tiny.labels(model)}


# A traced graph runs the memory in chunks whatever its size, which sums in another order: some last places of float32.
ROUNDING = {"rtol": 2e-6, "atol": 1e-6}


@pytest.mark.parametrize(("cls", "name"), PAIRS)
def test_models_compile_fullgraph(cls, name):
    model = tiny.build(cls, name)
    given = arguments(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**given)[0], model(**given)[0], **ROUNDING)
    del given["attention_mask"]
    torch.testing.assert_close(compiled(**given)[0], model(**given)[0], **ROUNDING)


@pytest.mark.parametrize("name", ["signal", "coupled"])
def test_loops_over_time_run_past_the_compiler(name):
    """They have kernels of their own, and what it would make of their steps is several times as slow."""
    model = tiny.build(LMUForSequenceClassification, name)
    given = arguments(model)
    losses = []
    torch._dynamo.utils.counters.clear()
    for each in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        losses.append(each(**given).loss)
        losses[-1].backward()
        losses += [p.grad.clone() for p in model.parameters()]
    half = len(losses) // 2
    torch.testing.assert_close(losses[:half], losses[half:], rtol=0, atol=0)  # the same functions
    # What comes before the loop, what comes after it, and what transformers wraps around a model.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8


def test_a_loop_that_is_asked_for_step_by_step_is_unrolled():
    layer, x = LMU(2, 2, 4, 9.0, "rnn", 3, hidden_to_memory=True, algorithm="naive"), torch.randn(2, 5, 2)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-6)
    layer.algorithm = "auto"
    with pytest.raises(torch._dynamo.exc.Unsupported, match="algorithm='naive' lets it be unrolled"):
        compiled(x)


@pytest.mark.parametrize(("cls", "name"), PAIRS)
def test_models_export_for_batches_of_any_size(cls, name):
    model = tiny.build(cls, name)
    given = arguments(model)
    given.pop("labels", None)
    shapes = {key: None if key == "use_cache" else {0: torch.export.Dim.AUTO} for key in given}
    exported = torch.export.export(model, (), given, dynamic_shapes=shapes).module()
    for rows in (4, 3):
        some = {key: value[:rows] if isinstance(value, torch.Tensor) else value for key, value in given.items()}
        torch.testing.assert_close(exported(**some)[0], model(**some)[0], **ROUNDING)


@pytest.mark.parametrize(
    ("cls", "name", "masked"),
    [(LMUForSequenceClassification, *rest) for rest in (("dense", False), ("dense", True), ("residual", True))]
    + [(cls, "residual_last", True) for cls in tiny.CLASSES if cls is not LMUForSequenceClassification],
)
def test_models_export_for_sequences_of_any_length(cls, name, masked):
    model = tiny.build(cls, name).double()
    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")

    def given(rows, steps):
        inputs = {key: v.double() if v.is_floating_point() else v for key, v in tiny.inputs(model, rows, steps).items()}
        return {**inputs, "attention_mask": torch.rand(rows, steps) < 0.7} if masked else inputs

    example = given(3, 15)
    shapes = {key: {0: batch, 1: time} for key in example}
    exported = torch.export.export(model, (), {**example, "use_cache": False}, dynamic_shapes={**shapes, "use_cache": None})
    for rows, steps in ((2, 2), (3, 40), (2, 333)):
        some = {**given(rows, steps), "use_cache": False}
        # float64, so that nothing but rounding fits in, however long the sequence.
        torch.testing.assert_close(exported.module()(**some)[0], model(**some)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["signal", "coupled", "deep", "mean", "both_ways"])
def test_recurrent_models_export(name):
    model = tiny.build(LMUForSequenceClassification, name)
    given = arguments(model)
    del given["labels"]
    exported = torch.export.export(model, (), given).module()
    torch.testing.assert_close(exported(**given)[0], model(**given)[0], rtol=0, atol=1e-6)


class Step(torch.nn.Module):
    """One step of a stream as a function of sample and state."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, sample, state):
        streamer = self.model.streamer(sample.shape[0])
        streamer.cache = LMUCache.from_state_dict(state)
        return streamer.step(sample), streamer.cache.state_dict()


@pytest.mark.parametrize("name", tiny.FORWARD)
def test_export_of_a_step_of_a_model(name):
    model = tiny.build(LMUForSequenceClassification, name)
    (values,) = tiny.inputs(model).values()
    streamer = model.streamer(4)
    streamer.feed(values[:, :3])
    state = streamer.cache.state_dict()
    exported = torch.export.export(Step(model), (values[:, 3], state)).module()
    for t in range(3, 9):
        logits, state = exported(values[:, t], state)
        torch.testing.assert_close(logits, streamer.step(values[:, t]), rtol=0, atol=1e-6)
    assert LMUCache.from_state_dict(state).get_seq_length() == 9


@pytest.mark.filterwarnings("ignore")  # of torch, on loading the example inputs
@pytest.mark.parametrize("name", ["signal", "dense", "residual_last"])
def test_exported_steps_take_and_give_the_cache(name, tmp_path):
    """A language model as two programs, one for the prompt and one for each token, as they come back from a file."""
    model = tiny.build(LMUForCausalLM, name)
    tokens, mask = torch.randint(1, 11, (2, 12)), tiny.padding("left", 7, [7, 4]).long()
    cache = model(tokens[:, :7], attention_mask=mask).past_key_values
    programs = [
        torch.export.export(model, (), {"input_ids": tokens[:, :7], "attention_mask": mask}),
        torch.export.export(
            model, (), {"input_ids": tokens[:, :1], "attention_mask": torch.ones(2, 1), "past_key_values": cache}
        ),
    ]
    assert cache.seen == 7
    for index, program in enumerate(programs):
        torch.export.save(program, tmp_path / f"{index}.pt2")
    prompt, step = (torch.export.load(tmp_path / f"{index}.pt2").module() for index in range(2))
    outputs = prompt(input_ids=tokens[:, :7], attention_mask=mask)
    for t in range(7, 12):
        assert type(outputs.past_key_values) is LMUCache
        outputs = step(
            input_ids=tokens[:, t : t + 1], attention_mask=torch.ones(2, 1), past_key_values=outputs.past_key_values
        )
        expected = model(tokens[:, t : t + 1], past_key_values=cache)
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-6)
    assert outputs.past_key_values.seen == 12


def test_compiled_steps_are_not_compiled_again():
    model = tiny.build(LMUForSequenceClassification, "dense")
    values = torch.randn(2, 30, 2)
    compiled, cache = torch.compile(model, backend="eager"), LMUCache(1)
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for t in range(30):
            logits = compiled(input_values=values[:, t : t + 1], past_key_values=cache).logits
    torch.testing.assert_close(logits, model(input_values=values).logits, rtol=0, atol=1e-6)
    # The first step starts from nothing, the second finds the operators of the memory made.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
