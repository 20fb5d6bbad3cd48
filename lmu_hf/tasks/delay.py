"""Delay: say what the input was up to ``delay`` steps ago, at every step; how much of the past a memory holds.

The capacity task of Voelker, Kajic & Eliasmith 2019, in a form that is the same for every delay: the input is white noise
without frequencies above ``cycles`` periods per delay, so a longer delay is the same signal sampled more finely. The paper
gives its errors as a figure only.
"""

from typing import Any

import numpy as np

from ..errors import InputError
from ..model.processing_lmu import LMUFeatureExtractor
from .base import PARTS, Part, TaskData, check_processor, check_whole

OPTIONS = ("delay", "targets", "cycles", "rows", "data_seed")


def lags(delay: int, targets: int) -> list[int]:
    """The delays that are asked for, in steps: equal parts of the longest."""
    return [round(delay * (index + 1) / targets) for index in range(targets)]


def noise(rows: int, steps: int, delay: int, cycles: int, seed: int) -> np.ndarray:
    """White noise of unit power without frequencies above ``cycles / delay`` periods per step: (rows, steps), float32."""
    generator = np.random.RandomState(seed)  # whose streams NumPy guarantees for ever
    length = 2 * steps  # of which half is used, since the whole is periodic
    count = max(1, cycles * length // delay)
    spectrum = np.zeros((rows, length // 2 + 1), dtype=np.complex128)
    real, imaginary = generator.normal(size=(2, rows, count))
    spectrum[:, 1 : count + 1] = (real + 1j * imaginary) * (length / (2 * count**0.5))
    return np.fft.irfft(spectrum, length)[:, :steps].astype(np.float32)


def load(
    data: str | None = None,
    processor: Any = None,
    delay: int = 1000,
    targets: int = 5,
    cycles: int = 10,
    rows: int = 32,
    data_seed: int = 0,
) -> TaskData:
    """Makes the task.

    Each series is twice as long as the delay. What is asked for is known, and counts, from the step on at which the longest delay
    lies within the series.

    Args:
        data: must be None; the series are computed.
        processor: that of a trained model; made here when None.
        delay: the longest delay, in steps.
        targets: number of delays, equal parts of the longest.
        cycles: periods of the highest frequency within the longest delay.
        rows: series that train; a quarter as many validate, half as many test.
        data_seed: of the series.
    """
    if data is not None:
        raise InputError("data: the series are computed; leave out --data, or choose another task")
    for name, value, smallest in (("targets", targets, 1), ("cycles", cycles, 1), ("rows", rows, 4)):
        check_whole(f"task.{name}", value, smallest)
    check_whole("task.delay", delay, max(2 * cycles, targets))
    check_whole("task.data_seed", data_seed, 0, 2**32 - 1)
    if processor is None:
        processor = LMUFeatureExtractor()
    check_processor(processor, LMUFeatureExtractor)
    counts = {"train": rows, "validation": rows // 4, "test": rows // 2}
    series = noise(sum(counts.values()), 2 * delay, delay, cycles, data_seed)
    parts, asked = {}, lags(delay, targets)
    for part in PARTS:
        taken, series = series[: counts[part]], series[counts[part] :]
        labels = np.full((*taken.shape, targets), np.nan, dtype=np.float32)
        for index, lag in enumerate(asked):
            labels[:, delay:, index] = taken[:, delay - lag : 2 * delay - lag]
        parts[part] = Part(np.stack([processor.sequence(row) for row in taken]), labels)
    return TaskData(
        name="delay",
        parts=parts,
        processor=processor,
        label_names=[f"{lag} steps ago" for lag in asked],
        dataset={
            "name": f"noise of up to {cycles} periods in {delay:,} steps, remembered",
            "id": None,
            "split": "independent series",
            "rows": counts,
            "steps": 2 * delay,
            "unit": "standard deviations of the noise",
        },
        kind="series",
        every=max(1, delay // 500),
    )
