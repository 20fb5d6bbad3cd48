"""Time series: targets, losses and roll-outs against what one would write down by hand."""

import math

import pytest
import torch
from tiny import build, padding

from lmu_hf import LMUForTimeSeriesPrediction

SPANS = [(1, 1), (1, 4), (3, 1), (3, 2)]


def make(name="dense", **kwargs):
    return build(LMUForTimeSeriesPrediction, name, **kwargs)


@pytest.mark.parametrize("side", [None, "left", "right", "holes"])
@pytest.mark.parametrize(("horizon", "length"), SPANS)
def test_targets(horizon, length, side):
    model = make(horizon=horizon, prediction_length=length)
    series = torch.randn(3, 12, 2)
    mask = torch.ones(3, 12, dtype=torch.bool) if side is None else padding(side, 12, [12, 7, 2])
    found = model.targets(series.masked_fill(~mask[..., None], torch.nan), None if side is None else mask)
    found = found[:, :, None] if length == 1 else found
    assert found.shape == (3, 12, length, 2)
    for row in range(3):
        own = series[row, mask[row]]
        for t, step in enumerate(mask[row].nonzero()[:, 0]):
            for k in range(length):
                expected = own[t + horizon + k] if t + horizon + k < len(own) else torch.full((2,), torch.nan)
                assert torch.equal(found[row, step, k].nan_to_num(9), expected.nan_to_num(9))


@pytest.mark.parametrize("loss", ["mse", "huber"])
@pytest.mark.parametrize("every", [True, False])
def test_losses(loss, every):
    model = make(prediction_loss=loss, huber_delta=0.3, return_sequences=every, prediction_length=2, kernel_regularizer="l2")
    x = torch.randn(3, 9, 2)
    predictions = model(input_values=x).predictions
    assert predictions.shape == ((3, 9, 2, 2) if every else (3, 2, 2))
    labels = torch.randn_like(predictions)
    elementwise = {
        "mse": torch.nn.functional.mse_loss,
        "huber": lambda a, b: torch.nn.functional.huber_loss(a, b, delta=0.3),
    }[loss]
    expected = elementwise(predictions, labels) + model.regularization_loss()
    torch.testing.assert_close(model(input_values=x, labels=labels).loss, expected)
    # What is not known does not count.
    known = torch.rand(labels.shape) < 0.5
    found = model(input_values=x, labels=labels.masked_fill(~known, torch.nan)).loss
    torch.testing.assert_close(found, elementwise(predictions[known], labels[known]) + model.regularization_loss())
    found.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_nothing_known_is_no_loss():
    model = make()
    x = torch.randn(2, 5, 2)
    assert model(input_values=x, labels=torch.full_like(x, torch.nan)).loss == 0


def test_one_value_needs_no_axis():
    model = make("signal", input_size=1)
    x, labels = torch.randn(2, 9), torch.randn(2, 9)
    found = model(input_values=x, labels=labels)
    assert found.predictions.shape == (2, 9, 1)
    assert found.loss == model(input_values=x[..., None], labels=labels[..., None]).loss
    assert model.forecast(x, 3).shape == (2, 3, 1)


@pytest.mark.parametrize("name", ["dense", "coupled", "deep", "residual", "trained_theta"])
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize(("horizon", "length"), SPANS)
def test_forecast_by_hand(name, horizon, length, every):
    kwargs = {"pooling": "last"} if name == "residual" else {}
    model = make(name, horizon=horizon, prediction_length=length, return_sequences=every, **kwargs)
    series = torch.randn(2, 9, 2)
    found = model.forecast(series, 11)
    assert found.shape == (2, 11, 2)
    # Runs the whole series anew whenever no prediction is left.
    known = series
    with torch.no_grad():
        while known.shape[1] < 20:
            made = model._project(model.model(input_values=known, return_sequences=True).last_hidden_state)
            end, added = known.shape[1], []
            for index in range(end, end + horizon + length - 1):
                step = min(end - 1, index - horizon)
                added.append(made[:, step, index - step - horizon])
            known = torch.cat([known, torch.stack(added, dim=1)], dim=1)
    # The same float32 sums in another order, fed back eleven times.
    torch.testing.assert_close(found, known[:, 9:20], rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize(("horizon", "length"), SPANS)
def test_forecast_of_padded_rows(horizon, length, side):
    model = make(horizon=horizon, prediction_length=length)
    series, mask = torch.randn(3, 12, 2), padding(side, 12, [12, 7, 3])
    found = model.forecast(series.masked_fill(~mask[..., None], torch.nan), 6, attention_mask=mask)
    for row in range(3):
        torch.testing.assert_close(found[row], model.forecast(series[row : row + 1, mask[row]], 6)[0], rtol=0, atol=1e-5)


def test_forecast_goes_on_from_a_state_and_leaves_it():
    model = make(horizon=2)
    series = torch.randn(2, 12, 2)
    cache = model(input_values=series[:, :5], use_cache=True).past_key_values
    for _ in range(2):
        found = model.forecast(series[:, 5:], 4, past_key_values=cache)
        torch.testing.assert_close(found, model.forecast(series, 4), rtol=0, atol=1e-5)
    assert cache.get_seq_length() == 5


def test_forecast_is_without_dropout_and_keeps_the_mode():
    model = make(classifier_dropout=0.5).train()
    series = torch.randn(2, 5, 2)
    assert torch.equal(model.forecast(series, 4), model.forecast(series, 4))
    assert model.training


def test_learns_a_wave_and_rolls_it_out():
    model = make("signal", input_size=1, theta=20.0, order=8, hidden_cell="dense", hidden_size=8).train()
    wave = torch.sin(2 * math.pi * torch.arange(140) / 20)[None, :, None]
    labels = model.targets(wave[:, :100])
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(300):
        optimizer.zero_grad()
        model(input_values=wave[:, :100], labels=labels).loss.backward()
        optimizer.step()
    # Two periods of its own predictions.
    assert (model.forecast(wave[:, :100], 40) - wave[:, 100:]).abs().max() < 0.1


@pytest.mark.parametrize(
    ("kwargs", "given", "message"),
    [
        ({"target_size": 1}, {}, "predicts its own inputs, found target_size=1 and input_size=2"),
        ({}, {"steps": 0}, "steps: expected a whole number >= 1, found 0"),
        ({"horizon": 6}, {}, "needs horizon=6 valid steps per row, found a row with 5"),
        ({"horizon": 3}, {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])}, "found a row with 2"),
        ({}, {"input_values": torch.zeros(2, 5, 3)}, "input_values: expected .*, 2., found .2, 5, 3."),
        ({"return_sequences": False, "bidirectional": True}, {}, "reads each sequence from its end"),
    ],
)
def test_forecasts_that_cannot_be_made(kwargs, given, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs).forecast(**{"input_values": torch.randn(2, 5, 2), "steps": 3, **given})


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="labels: expected .2, 5, 2. like the predictions, found .2, 5, 3."):
        make()(input_values=torch.randn(2, 5, 2), labels=torch.zeros(2, 5, 3))


def test_other_values_than_its_inputs():
    model = make(target_size=3)
    x, target = torch.randn(2, 5, 2), torch.randn(2, 5, 3)
    assert model(input_values=x, labels=target).predictions.shape == (2, 5, 3)
    assert model.targets(target).shape == (2, 5, 3)
