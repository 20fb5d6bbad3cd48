"""The delay task: band-limited noise, labels that are its past, and a memory that holds it."""

import numpy as np
import pytest
import torch

from lmu_hf import LMUConfig, LMUForTimeSeriesPrediction
from lmu_hf.errors import InputError
from lmu_hf.tasks import load_task
from lmu_hf.tasks.delay import noise


def test_noise_has_the_band_that_it_should():
    values = noise(50, 4000, delay=1000, cycles=5, seed=0)
    assert float(np.square(values).mean()) == pytest.approx(1, rel=0.05)  # 50 rows of 40 frequencies each
    spectrum = np.abs(np.fft.rfft(values * np.hanning(4000))) ** 2
    # 5 periods in 1,000 steps are 20 in 4,000; the window smears over two more.
    assert spectrum[:, 23:].sum() < 1e-4 * spectrum.sum()
    assert np.abs(np.corrcoef(values[:10])).sum() < 25  # independent rows: 10 on the diagonal


def test_labels_are_the_past():
    task = load_task("delay", delay=40, targets=2, rows=4)
    assert task.label_names == ["20 steps ago", "40 steps ago"]
    assert task.dataset["rows"] == {"train": 4, "validation": 1, "test": 2}
    assert not task.predicts_input
    row = task.parts["test"][1]
    values, labels = row["input_values"][:, 0], row["labels"]
    assert labels[:40].isnan().all()
    assert torch.equal(labels[40:, 0], values[20:60])
    assert torch.equal(labels[40:, 1], values[:40])


def test_a_memory_holds_what_was():
    """Nothing trained but the read-out, here by least squares."""
    task = load_task("delay", delay=100, rows=32)
    config = LMUConfig(order=30, theta=110, hidden_cell=None, kernel_initializer=None, target_size=5)
    model = LMUForTimeSeriesPrediction(config).eval()
    assert sum(p.numel() for p in model.model.parameters()) == 0

    def memory(part):
        rows, labels = torch.stack(task.parts[part].values), torch.stack(task.parts[part].labels)
        with torch.no_grad():
            states = model.model(input_values=rows).last_hidden_state
        return states[:, 100:].reshape(-1, 30).double(), labels[:, 100:].reshape(-1, 5).double()

    states, labels = memory("train")
    weights = torch.linalg.lstsq(states, labels).solution
    states, labels = memory("test")
    # Order 30 for 2 pi 10 = 63 radians in the window: half of what is needed; the mean alone would score 1.
    errors = ((states @ weights - labels).square().mean(0) / labels.var(0)).sqrt()
    assert errors.max() < 0.6
    assert errors.min() < 0.2


def test_a_stream_holds_it_too():
    """Step by step, with the state of one step whatever the delay."""
    sizes = []
    for delay in (100, 100_000):
        config = LMUConfig(order=20, theta=delay, hidden_cell=None, kernel_initializer=None, target_size=5)
        model = LMUForTimeSeriesPrediction(config).eval()
        stream, steps = model.streamer(), torch.randn(1, 60, 1)
        for step in range(60):
            found = stream.step(steps[:, step])
        with torch.no_grad():
            expected = model(input_values=steps).predictions[:, -1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # float32 sums of 60 steps in another order
        sizes.append(sum(tensor.numel() for tensor in stream.cache.states[0].tensors()))
    assert sizes == [20, 20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "x"}, "leave out --data"),
        ({"delay": 19}, "task.delay: expected a whole number >= 20, found 19"),
        ({"rows": 3}, "task.rows: expected a whole number >= 4, found 3"),
        ({"targets": 0}, "task.targets: expected"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        load_task("delay", **options)
