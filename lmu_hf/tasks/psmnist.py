"""Permuted sequential MNIST: 28 x 28 pixels in one fixed random order, 784 steps of one number.

The usual split: the first 50,000 training images train, the last 10,000 of them validate, and the 10,000 test images are
scored once, at the end.
"""

from typing import Any

import numpy as np

from ..errors import InputError
from ..model.processing_lmu import LMUImageProcessor
from .base import Part, TaskData, check_labels, check_processor, column, load_tables, process

OPTIONS = ("permutation", "image_mean", "image_std", "image_column", "label_column")
CLASSES = 10
HUB_ID = "ylecun/mnist"
PERMUTATIONS = ("keras-lmu", "voelker2019", "none")


def pixel_order(name: str) -> list[int] | None:
    """One of the published orders of the 784 pixels.

    Args:
        name: "keras-lmu" (the example of that package, seed 0), "voelker2019" (the run of the paper, seed 50) or "none".
    """
    # NumPy guarantees the streams of RandomState for ever, which is what makes an order reproducible.
    if name == "keras-lmu":
        return np.random.RandomState(0).permutation(784).tolist()
    if name == "voelker2019":
        generator = np.random.RandomState(50)
        generator.permutation(60_000)  # the paper shuffled the images first, from the same stream
        return generator.permutation(784).tolist()
    if name == "none":
        return None
    raise InputError(f"task.permutation: expected one of {list(PERMUTATIONS)}, found {name!r}")


def load(
    data: str | None = None,
    processor: Any = None,
    permutation: str | None = None,
    image_mean: float = 0.0,
    image_std: float = 1.0,
    image_column: str = "image",
    label_column: str = "label",
) -> TaskData:
    """Loads the task.

    Args:
        data: folder with train*.parquet and test*.parquet (columns of images and labels), or an id on the Hub; None for
            ``ylecun/mnist``.
        processor: that of a trained model; made here when None.
        permutation: "keras-lmu", "voelker2019" or "none"; None for that of the processor, or else "keras-lmu".
        image_mean: subtracted from the pixels in [0, 1].
        image_std: divided by after that.
        image_column: name of the column of images.
        label_column: name of the column of labels.
    """
    tables = load_tables(data or HUB_ID, "psmnist")
    if missing := {"train", "test"} - set(tables):
        raise InputError(f"data: expected train*.parquet and test*.parquet, found no {sorted(missing)[0]} part in {data}")
    order = pixel_order("keras-lmu" if permutation is None else permutation)
    if processor is None:
        try:
            processor = LMUImageProcessor(permutation=order, image_mean=image_mean, image_std=image_std)
        except ValueError as error:
            raise InputError(f"task.{error}") from error
    check_processor(processor, LMUImageProcessor)
    if permutation is not None and processor.permutation != order:
        raise InputError(f"task.permutation: the model reads its pixels in another order than {permutation!r}; leave it out")
    order = processor.permutation
    arrays: dict[str, tuple[Any, list[int]]] = {}
    for part in ("train", "test"):
        images = column(tables[part], part, image_column, "image")
        labels = check_labels(part, column(tables[part], part, label_column, "label"), CLASSES)
        arrays[part] = (np.stack(process(part, images, processor.sequence)), labels)
    values, labels = arrays["train"]
    held_out = len(labels) // 6  # 10,000 of 60,000
    if held_out == 0:
        raise InputError(f"data: expected at least 6 training images to hold some out for validation, found {len(labels)}")
    parts = {
        "train": Part(values[:-held_out], labels[:-held_out]),
        "validation": Part(values[-held_out:], labels[-held_out:]),
        "test": Part(*arrays["test"]),
    }
    return TaskData(
        name="psmnist",
        parts=parts,
        processor=processor,
        label_names=[str(digit) for digit in range(CLASSES)],
        dataset={
            "name": "MNIST, pixels permuted" if order else "MNIST, pixel by pixel",
            "id": HUB_ID if len(labels) == 60_000 else None,
            "split": "the last sixth of the training images validates",
            "rows": {name: len(part) for name, part in parts.items()},
        },
    )
