"""Mackey-Glass: a chaotic time series, predicted 15 steps ahead at every step.

The equation is that of Mackey & Glass 1977, x'(t) = 0.2 x(t - tau) / (1 + x(t - tau)^10) - 0.1 x(t), chaotic for tau = 17; the
series is tanh(x - 1), sampled once per unit of time. The experiment is that of Voelker, Kajic & Eliasmith 2019: 128 series of
5,000 steps, the first half to train with, the second half to test.

What is different here, and why:

- The published notebook had input and target swapped, so that the past was told from the future. Here the future is predicted;
  the numbers to compare with are those of the corrected experiment.
- The equation is solved by the classical Runge-Kutta method with a step of 0.1; there by Euler's method with a step of 1, which
  gives another system.
- A thousand steps are thrown away before each series rather than a hundred: by then series that began close to each other have
  nothing in common, so no test series is near one of the training part.
- Of the first half an eighth is held out to choose the epoch to keep, so that the test part chooses nothing.
- Values are scaled by mean and deviation of the training part.

The sums below round in the same way on every machine, which matters: chaos would make another series of any difference.
"""

from typing import Any

import numpy as np

from ..errors import InputError
from ..model.processing_lmu import LMUFeatureExtractor
from .base import Part, TaskData, check_processor, check_whole

OPTIONS = ("tau", "horizon", "steps", "window", "series", "data_seed")

_SUBSTEPS = 10  # per unit of time; a hundred steps on, 20 would change a value by 1e-9
_DISCARDED = 1000


def mackey_glass(steps: int, series: int, tau: int = 17, seed: int = 0, *, discarded: int = _DISCARDED) -> np.ndarray:
    """Solves the equation.

    Args:
        steps: samples per series, one per unit of time.
        series: number of series. Each began as a constant drawn from 1.1 to 1.3.
        tau: delay, in units of time.
        seed: of these constants.
        discarded: units of time before the first sample.

    Returns:
        x, (series, steps), float64.
    """
    h, window = 1 / _SUBSTEPS, tau * _SUBSTEPS
    # NumPy guarantees the streams of RandomState for ever.
    x = np.random.RandomState(seed).uniform(1.1, 1.3, series)
    past, slope = np.tile(x, (window + 1, 1)), np.zeros((window + 1, series))
    samples = []
    for _ in range(-(-(discarded + steps) * _SUBSTEPS // window)):
        # Everything that the next tau units of time take from the past is known at once, at the steps and between them.
        middle = (past[:-1] + past[1:]) / 2 + h / 8 * (slope[:-1] - slope[1:])
        gain, gain_middle = _production(past), _production(middle)
        past, slope = np.empty_like(past), np.empty_like(slope)
        for step in range(window):
            past[step], slope[step] = x, gain[step] - 0.1 * x
            second = gain_middle[step] - 0.1 * (x + h / 2 * slope[step])
            third = gain_middle[step] - 0.1 * (x + h / 2 * second)
            fourth = gain[step + 1] - 0.1 * (x + h * third)
            x = x + h / 6 * (slope[step] + 2 * second + 2 * third + fourth)
        past[window], slope[window] = x, gain[window] - 0.1 * x
        samples.append(past[:window:_SUBSTEPS])
    return np.concatenate(samples)[discarded : discarded + steps].T


def _production(x: np.ndarray) -> np.ndarray:
    square = x * x
    fourth = square * square
    return 0.2 * x / (1 + fourth * fourth * square)  # products round alike everywhere, powers do not


def load(
    data: str | None = None,
    processor: Any = None,
    tau: int = 17,
    horizon: int = 15,
    steps: int = 5000,
    window: int | None = None,
    series: int = 128,
    data_seed: int = 0,
) -> TaskData:
    """Makes the task.

    Args:
        data: must be None; the series are computed.
        processor: that of a trained model; fitted to the training part when None.
        tau: delay of the equation.
        horizon: steps ahead.
        steps: length of each series.
        window: cut the training series into pieces of that many steps, for more updates from the same work; None for whole
            ones. Validation and test series stay whole.
        series: number of series, at least 16: 7 of 16 train, 1 validates, 8 test.
        data_seed: of the series.
    """
    if data is not None:
        raise InputError("data: the series are computed; leave out --data, or choose another task")
    for name, value, smallest in (("tau", tau, 1), ("horizon", horizon, 1), ("steps", steps, 2), ("series", series, 16)):
        check_whole(f"task.{name}", value, smallest)
    if window is not None:
        check_whole("task.window", window, 2, steps)
    check_whole("task.data_seed", data_seed, 0, 2**32 - 1)
    values = np.tanh(mackey_glass(steps + horizon, series, tau, data_seed) - 1).astype(np.float32)
    half, kept = series // 2, series // 2 - series // 16
    rows = {"train": slice(0, kept), "validation": slice(kept, half), "test": slice(half, None)}
    if processor is None:
        processor = LMUFeatureExtractor.fit(values[rows["train"], :steps])
    check_processor(processor, LMUFeatureExtractor)
    parts = {}
    for part, taken in rows.items():
        scaled = np.stack([processor.sequence(row) for row in values[taken]])
        inputs, targets = scaled[:, :steps], scaled[:, horizon:]
        if part == "train" and window is not None:
            inputs, targets = (_pieces(array, window) for array in (inputs, targets))
        parts[part] = Part(inputs, targets)
    return TaskData(
        name="mackey_glass",
        parts=parts,
        processor=processor,
        label_names=[f"{horizon} steps ahead"],
        dataset={
            "name": f"Mackey-Glass, tau {tau}, {horizon} steps ahead",
            "id": None,
            "split": "series that began elsewhere; the first half trains, but for an eighth of it that validates",
            "rows": {name: len(values[taken]) for name, taken in rows.items()},
            "steps": steps,
            "unit": "standard deviations of the training part",
        },
        kind="series",
        fields={"horizon": horizon},
        predicts_input=True,
    )


def _pieces(series: np.ndarray, window: int) -> np.ndarray:
    """(series, steps, features) as (pieces, window, features), without what is left at each end."""
    kept = series.shape[1] // window * window
    return series[:, :kept].reshape(-1, window, series.shape[2])
