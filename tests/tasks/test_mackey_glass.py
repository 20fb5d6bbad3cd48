"""Mackey-Glass: the equation's solution, the direction of time, and parts that know nothing of each other."""

import numpy as np
import pytest
import torch

from lmu_hf.errors import InputError
from lmu_hf.tasks import load_task
from lmu_hf.tasks import mackey_glass as module
from lmu_hf.tasks.mackey_glass import mackey_glass

SMALL = {"steps": 100, "series": 16}
LAST = [1.1815987816077398, 1.2016192356427253]


def test_first_delay_is_the_exponential_that_it_has_to_be():
    """Until tau the past is the constant that it began with, so x follows a linear equation with a known solution."""
    x = mackey_glass(18, 3, seed=1, discarded=0)
    start = x[:, :1]
    limit = 10 * 0.2 * start / (1 + start**10)
    expected = limit + (start - limit) * np.exp(-0.1 * np.arange(18))
    # The method's own error: (0.1 * 0.1)^5 / 120 per substep, 170 of them.
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-9)


def test_solver_is_of_fourth_order(monkeypatch):
    solutions = []
    for substeps in (4, 8, 16):
        monkeypatch.setattr(module, "_SUBSTEPS", substeps)
        solutions.append(mackey_glass(100, 4, discarded=0))
    first, second, third = solutions
    coarse, fine = np.abs(first - second).max(), np.abs(second - third).max()
    assert coarse / fine == pytest.approx(16, rel=0.35)  # 2^4, as the step goes to zero
    assert fine < 1e-5


def test_the_series_is_the_same_everywhere():
    """Chaos makes another series of the smallest difference, so that this holds exactly or not at all."""
    assert mackey_glass(400, 2)[:, -1].tolist() == LAST
    assert not np.array_equal(mackey_glass(50, 2, seed=1), mackey_glass(50, 2))


def test_the_future_from_the_past():
    task = load_task("mackey_glass", horizon=7, **SMALL)
    assert (task.kind, task.fields, task.predicts_input) == ("series", {"horizon": 7}, True)
    assert task.dataset["rows"] == {"train": 7, "validation": 1, "test": 8}
    for part in task.parts.values():
        for row in range(len(part)):
            values, labels = part[row]["input_values"], part[row]["labels"]
            assert values.shape == labels.shape == (100, 1)
            assert torch.equal(labels[:-7], values[7:])
    rows = torch.cat([torch.stack(part.values) for part in task.parts.values()])
    assert torch.cdist(rows[..., 0], rows[..., 0]).fill_diagonal_(1).min() > 0.1  # no series is in two parts


def test_only_the_training_part_scales():
    task = load_task("mackey_glass", **SMALL)
    train, test = (torch.cat(task.parts[part].values) for part in ("train", "test"))
    assert float(train.mean()) == pytest.approx(0, abs=1e-5)
    assert float(train.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert abs(float(test.mean())) > 1e-4
    again = load_task("mackey_glass", processor=task.processor, data_seed=1, **SMALL)
    assert again.processor is task.processor


def test_windows_are_of_training_only():
    whole, cut = load_task("mackey_glass", **SMALL), load_task("mackey_glass", window=30, **SMALL)
    assert [len(part) for part in cut.parts.values()] == [21, 1, 8]
    assert torch.equal(cut.parts["train"].values[4], whole.parts["train"].values[1][30:60])
    assert torch.equal(cut.parts["train"].labels[4], whole.parts["train"].labels[1][30:60])
    assert torch.equal(cut.parts["test"].values[0], whole.parts["test"].values[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "x"}, "leave out --data"),
        ({"series": 8}, "task.series: expected a whole number >= 16, found 8"),
        ({"tau": 17.5}, "task.tau: expected a whole number"),
        ({"window": 101}, "task.window: expected a whole number within 2..100, found 101"),
        ({"data_seed": -1}, "task.data_seed: expected"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=message):
        load_task("mackey_glass", **{**SMALL, **options})
