"""A stream gives what the model gives on everything fed so far."""

import copy

import pytest
import torch
from tiny import EVERY, FORWARD, build, cut, inputs

from lmu_hf import LMUCache, LMUForSequenceClassification, LMUForTimeSeriesPrediction, LMUModel

# The same float32 sums in another order, through up to three layers.
CLOSE = {"rtol": 0, "atol": 1e-5}


def expected(model, batch):
    """The prediction after the last step."""
    outputs = model(**batch)
    if isinstance(model, LMUForSequenceClassification):
        return outputs.logits
    steps = outputs.last_hidden_state if isinstance(model, LMUModel) else outputs[0]
    return steps[:, -1]


@pytest.mark.parametrize(
    ("cls", "name"), [pair for pair in EVERY if pair[1] in FORWARD], ids=lambda v: getattr(v, "__name__", v)
)
def test_follows_the_model(cls, name):
    model = build(cls, name)
    batch = inputs(model)
    (values,) = batch.values()
    streamer = model.streamer(4)
    for t in range(8):
        found = streamer.step(values[:, t])
        assert not found.requires_grad
        torch.testing.assert_close(found, expected(model, cut(batch, steps=slice(0, t + 1))), **CLOSE)
    torch.testing.assert_close(streamer.feed(values[:, 8:]), expected(model, batch), **CLOSE)


@pytest.mark.parametrize("name", ["signal", "mean", "max", "residual"])
@pytest.mark.parametrize("cls", [LMUForSequenceClassification, LMUForTimeSeriesPrediction])
def test_streams_are_independent(cls, name):
    """Samples come at different times, and one stream starts anew."""
    model = build(cls, name)
    streamer, heard = model.streamer(3), [[], [], []]
    for t in range(12):
        if t == 7:
            streamer.reset([1])
            heard[1] = []
        active = torch.rand(3) < 0.6 if t < 11 else torch.ones(3, dtype=torch.bool)
        sample = torch.randn(3, 2)
        for row in range(3):
            if active[row]:
                heard[row].append(sample[row])
        found = streamer.step(sample.masked_fill(~active[:, None], torch.nan), active)
        for row in range(3):
            if heard[row]:
                alone = expected(model, {"input_values": torch.stack(heard[row])[None]})[0]
                torch.testing.assert_close(found[row], alone, **CLOSE)


def test_memory_does_not_grow():
    model = build(LMUForSequenceClassification, "mean")
    streamer = model.streamer()
    sizes = set()
    for _ in range(50):
        streamer.step(torch.randn(1, 2))
        sizes.add(sum(tensor.numel() for tensor in streamer.cache.state_dict().values()))
    assert len(sizes) == 1


def test_goes_on_from_a_saved_state():
    model = build(LMUForSequenceClassification, "deep")
    streamer, other = model.streamer(2), model.streamer(2)
    streamer.feed(torch.randn(2, 9, 2))
    other.cache = LMUCache.from_state_dict(copy.deepcopy(streamer.cache.state_dict()))
    sample = torch.randn(2, 2)
    assert torch.equal(streamer.step(sample), other.step(sample))
    streamer.reset()
    assert torch.equal(streamer.step(sample), model.streamer(2).step(sample))


def test_one_channel_needs_no_channel_axis():
    model = build(LMUForTimeSeriesPrediction, "signal", input_size=1)
    x = torch.randn(1, 6)
    streamer = model.streamer()
    for t in range(6):
        found = streamer.step(x[:, t])
    torch.testing.assert_close(found, model(input_values=x).predictions[:, -1], **CLOSE)


def test_no_dropout_and_the_mode_is_kept():
    model = build(LMUForSequenceClassification, "dense", classifier_dropout=0.5, dropout=0.5).train()
    x = torch.randn(1, 9, 2)
    assert torch.equal(model.streamer().feed(x), model.streamer().feed(x))
    assert model.training


@pytest.mark.parametrize(
    ("name", "message"),
    [("both_ways", "bidirectional=True needs the end"), ("backwards", "go_backwards=True needs the end")],
)
def test_models_that_read_from_the_end_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        build(LMUForSequenceClassification, name).streamer()


def test_wrong_inputs():
    model = build(LMUModel, "signal")
    with pytest.raises(ValueError, match="batch_size: expected a whole number of streams >= 1, found 0"):
        model.streamer(0)
    streamer = model.streamer(2)
    with pytest.raises(ValueError, match="sample: expected one step of 2 streams, found .3, 2."):
        streamer.step(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="steps: expected 2 streams with a time axis, found .1, 5, 2."):
        streamer.feed(torch.zeros(1, 5, 2))
    with pytest.raises(ValueError, match="input_values: expected .* input_size=2., found .2, 1, 7."):
        streamer.step(torch.zeros(2, 7))
