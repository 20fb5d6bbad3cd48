"""Handwritten digits of 8 x 8 pixels as permuted sequences of 64 steps; comes with scikit-learn, needs no network."""

from typing import Any

import numpy as np

from ..errors import InputError
from ..model.processing_lmu import LMUImageProcessor
from .base import Part, TaskData, check_processor, process

OPTIONS = ("permute",)
CLASSES = 10


def load(data: str | None = None, processor: Any = None, permute: bool = True) -> TaskData:
    """Loads scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test set (1,797 images).

    The split is fixed: a stratified fifth of the images is the test part, an eighth of the rest the validation part.

    Args:
        data: must be None; the data is built in.
        processor: that of a trained model; made here when None.
        permute: read the pixels in a fixed random order rather than row by row.
    """
    if data is not None:
        raise InputError("data: the digits come with scikit-learn; leave out --data, or choose another task")
    if not isinstance(permute, bool):
        raise InputError(f"task.permute: expected true or false, found {permute!r}")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise InputError("digits: needs scikit-learn; install lmu-hf[train]") from error

    digits = load_digits()
    # 0..16 as published, to the 0..255 of image files, so that a PNG of a digit is read the same way.
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    rest, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=digits.target)
    train, validation = train_test_split(rest, test_size=0.125, random_state=0, stratify=digits.target[rest])
    rows = {"train": train, "validation": validation, "test": test}
    permutation = np.random.RandomState(0).permutation(64).tolist() if permute else None
    if processor is None:
        processor = LMUImageProcessor(size={"height": 8, "width": 8}, permutation=permutation, image_mean=0.2, image_std=0.4)
    check_processor(processor, LMUImageProcessor)
    return TaskData(
        name="digits",
        parts={
            part: Part(process(part, images[indices], processor.sequence), digits.target[indices])
            for part, indices in rows.items()
        },
        processor=processor,
        label_names=[str(digit) for digit in range(CLASSES)],
        dataset={
            "name": "Optical Recognition of Handwritten Digits (UCI, as in scikit-learn)",
            "id": "sklearn/digits",
            "split": "stratified, fixed",
            "rows": {part: len(indices) for part, indices in rows.items()},
        },
    )
