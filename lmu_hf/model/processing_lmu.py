"""From images and signals to the inputs of an LMU model; saved beside the weights.

Two processors, one per kind of data, because transformers looks for an image processor for images and a feature extractor
for signals. Text needs neither: any tokenizer does. Both give ``input_values`` (batch, time, features) and
``attention_mask`` (batch, time).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.image_processing_utils import BaseImageProcessor


class LMUImageProcessor(BaseImageProcessor):
    """Reads images as sequences of pixels, row by row, optionally in a fixed permuted order.

    Args:
        size: ``{"height": ..., "width": ...}`` in pixels. Images of another size are refused, or resized with ``do_resize``.
        do_resize: resize images to ``size`` (bilinear).
        image_mode: "L" for one grey value per step, "RGB" for three.
        rescale_factor: what pixel values 0..255 are multiplied with.
        image_mean: subtracted after rescaling, a number or one per channel.
        image_std: divided by after that.
        permutation: order in which the pixels are read, a permutation of 0 .. height*width-1, stored by value; None for
            row by row. Permuted sequential MNIST is made by one.

    Raises:
        ValueError: the permutation is none, or a value is wrong.
    """

    model_input_names = ["input_values", "attention_mask"]  # noqa: RUF012
    # Pipelines that run in batches ask for it, though images of one size need no padding.
    padding_value = 0.0

    def __init__(
        self,
        size: dict[str, int] | None = None,
        do_resize: bool = False,
        image_mode: str = "L",
        rescale_factor: float = 1 / 255,
        image_mean: float | Sequence[float] = 0.0,
        image_std: float | Sequence[float] = 1.0,
        permutation: Sequence[int] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        size = dict(size or {"height": 28, "width": 28})
        if set(size) != {"height", "width"} or min(size.values()) < 1:
            raise ValueError(f"size: expected {{'height': ..., 'width': ...}} in pixels, found {size}")
        if image_mode not in ("L", "RGB"):
            raise ValueError(f"image_mode: expected 'L' or 'RGB', found {image_mode!r}")
        pixels = size["height"] * size["width"]
        if permutation is not None and sorted(permutation) != list(range(pixels)):
            raise ValueError(
                f"permutation: expected every number of 0 .. {pixels - 1} once, found {len(permutation)} entries with "
                f"{len(set(permutation))} different values"
            )
        channels = 1 if image_mode == "L" else 3
        _check_scale("image_mean", image_mean, channels)
        _check_scale("image_std", image_std, channels, positive=True)
        _check_scale("rescale_factor", rescale_factor, 1, positive=True)
        self.size, self.do_resize, self.image_mode = size, do_resize, image_mode
        self.rescale_factor, self.image_mean, self.image_std = rescale_factor, image_mean, image_std
        self.permutation = None if permutation is None else [int(i) for i in permutation]

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        # AutoProcessor tries one kind after the other on the same file; a signal's settings must not pass for an image's.
        if "feature_extractor_type" in image_processor_dict:
            raise ValueError("this checkpoint takes signals; load its processor with AutoFeatureExtractor")
        return super().from_dict(image_processor_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data, as they are saved."""
        # The image pipeline looks for a video processor as well. Told of none, it would guess one from the code that travels
        # along and ask whether to trust that, even where lmu_hf is installed.
        return {**super().to_dict(), "video_processor_type": "none"}

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Turns images into sequences.

        Args:
            images: a PIL image, a NumPy array or torch tensor with values 0..255, (height, width), (height, width, 3) or
                (3, height, width), or a list of these.
            return_tensors: "pt", "np" or None for lists.

        Returns:
            ``input_values`` (batch, height * width, channels), float32.

        Raises:
            ValueError: an image has another size or too many channels, or an argument is unknown.
        """
        if kwargs := {key: value for key, value in kwargs.items() if value is not None}:
            raise ValueError(f"images: unknown arguments {sorted(kwargs)}; settings belong into the constructor")
        batch = images if isinstance(images, list | tuple) else [images]
        if not batch:
            raise ValueError("images: expected at least one image, found none")
        return BatchFeature(
            {"input_values": np.stack([self.sequence(image) for image in batch])}, tensor_type=return_tensors
        )

    def sequence(self, image: Any) -> np.ndarray:
        """One image as a sequence (height * width, channels), float32."""
        pixels = self._pixels(image).reshape(self.size["height"] * self.size["width"], -1)
        values = _standardize(pixels.astype(np.float32) * np.float32(self.rescale_factor), self.image_mean, self.image_std)
        return values if self.permutation is None else values[self.permutation]

    def image(self, sequence: Any) -> Any:
        """The PIL image that a sequence (height * width, channels) of this processor was made from, up to rounding."""
        values = np.asarray(sequence, dtype=np.float64) * np.asarray(self.image_std) + np.asarray(self.image_mean)
        pixels = np.empty_like(values)
        pixels[slice(None) if self.permutation is None else self.permutation] = values / self.rescale_factor
        shape = (self.size["height"], self.size["width"], *([3] if self.image_mode == "RGB" else []))
        return _pillow().fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8).reshape(shape))

    def _pixels(self, image: Any) -> np.ndarray:
        Image = _pillow()
        if not isinstance(image, Image.Image):
            array = np.asarray(image)
            if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
                array = np.moveaxis(array, 0, -1)
            if array.ndim == 3 and array.shape[-1] == 1:
                array = array[..., 0]
            if array.ndim not in (2, 3) or array.size == 0:
                raise ValueError(f"images: expected (height, width) or (height, width, 3), found {array.shape}")
            if array.dtype.kind not in "uif" or not np.isfinite(array).all() or array.min() < 0 or array.max() > 255:
                raise ValueError("images: expected pixel values within 0..255, found NaN or values outside")
            if not np.array_equal(array, np.round(array)):
                raise ValueError("images: expected whole pixel values 0..255, found fractions; multiply by 255 and round")
            image = Image.fromarray(array.astype(np.uint8))
        image = _eight_bit(image).convert(self.image_mode)
        expected = (self.size["width"], self.size["height"])
        if image.size != expected:
            if not self.do_resize:
                raise ValueError(
                    f"images: expected {expected[0]} x {expected[1]} pixels, found {image.size[0]} x {image.size[1]}; resize "
                    "the image, or set do_resize=True on the processor"
                )
            image = image.resize(expected, Image.Resampling.BILINEAR)
        return np.asarray(image)


class LMUFeatureExtractor(SequenceFeatureExtractor):
    """Scales signals and pads those of different lengths into one batch with a mask.

    Args:
        feature_size: channels per time step.
        sampling_rate: samples per second of the signals, for audio; checked where the caller gives one.
        padding_value: value of padded steps. The model never reads it.
        padding_side: "right" or "left".
        mean: subtracted from the signal, a number or one per channel.
        std: divided by after that.

    Raises:
        ValueError: a value is wrong.
    """

    model_input_names = ["input_values", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 1,
        padding_value: float = 0.0,
        padding_side: str = "right",
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        **kwargs: Any,
    ):
        super().__init__(feature_size, sampling_rate, padding_value, padding_side=padding_side, **kwargs)
        if isinstance(feature_size, bool) or not isinstance(feature_size, int) or feature_size < 1:
            raise ValueError(f"feature_size: expected a whole number of channels >= 1, found {feature_size!r}")
        if isinstance(sampling_rate, bool) or not isinstance(sampling_rate, int) or sampling_rate < 1:
            raise ValueError(f"sampling_rate: expected a whole number of samples per second >= 1, found {sampling_rate!r}")
        _check_scale("mean", mean, feature_size)
        _check_scale("std", std, feature_size, positive=True)
        self.mean, self.std = _plain(mean), _plain(std)

    @classmethod
    def from_dict(cls, feature_extractor_dict: dict[str, Any], **kwargs: Any) -> Any:
        if "image_processor_type" in feature_extractor_dict:
            raise ValueError("this checkpoint takes images; load its processor with AutoImageProcessor")
        return super().from_dict(feature_extractor_dict, **kwargs)

    @classmethod
    def fit(cls, signals: Sequence[Any], **kwargs: Any) -> "LMUFeatureExtractor":
        """A feature extractor whose mean and std are those of the given signals, per channel.

        Args:
            signals: signals (time,) or (time, channels). Give the training part only.
            **kwargs: other arguments of the constructor.
        """
        arrays = [np.atleast_2d(np.asarray(signal, dtype=np.float64).T).T for signal in signals]
        stacked = np.concatenate(arrays)
        std = stacked.std(0)
        return cls(
            feature_size=stacked.shape[1], mean=stacked.mean(0).tolist(), std=np.where(std > 0, std, 1.0).tolist(), **kwargs
        )

    def sequence(self, signal: Any) -> np.ndarray:
        """One signal (time,) or (time, channels), checked and scaled: (time, channels), float32.

        Raises:
            ValueError: the number of channels is wrong, the signal is empty, or a value is not finite.
        """
        array = np.asarray(signal, dtype=np.float32)
        if array.ndim == 1 and self.feature_size == 1:
            array = array[:, None]
        if array.ndim != 2 or array.shape[1] != self.feature_size or len(array) == 0:
            raise ValueError(f"signal: expected (time >= 1, channels={self.feature_size}), found {array.shape}")
        check_finite(array)
        return _standardize(array, self.mean, self.std)

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        pad_to_multiple_of: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Turns signals into a padded batch.

        Args:
            raw_speech: a signal (time,) or (time, channels) as array, tensor or list of numbers, or a list of signals; the
                name is the one that transformers' audio pipelines use.
            sampling_rate: samples per second of these signals; refused if it is not the one of the model.
            padding: as in transformers: True for the longest, "max_length", or False.
            max_length: length to pad or truncate to, in steps.
            truncation: cut signals longer than ``max_length``.
            return_tensors: "pt", "np" or None.
            return_attention_mask: also return the mask; the default.
            pad_to_multiple_of: pad to a length that is a multiple of this.

        Returns:
            ``input_values`` (batch, time, channels), float32, and ``attention_mask`` (batch, time).

        Raises:
            ValueError: a signal has the wrong shape or is not finite, or the sampling rate differs.
        """
        if kwargs := {key: value for key, value in kwargs.items() if value is not None}:
            raise ValueError(f"signal: unknown arguments {sorted(kwargs)}; settings belong into the constructor")
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate: expected {self.sampling_rate} samples per second, found {sampling_rate}; resample the signal"
            )
        sequences = [self.sequence(signal) for signal in _as_batch(raw_speech, self.feature_size)]
        if self.feature_size == 1:
            # transformers' pad wants signals of one channel without the channel axis.
            sequences = [sequence[:, 0] for sequence in sequences]
        padded = self.pad(
            BatchFeature({"input_values": sequences}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=True if return_attention_mask is None else return_attention_mask,
        )
        values = [np.asarray(value, dtype=np.float32).reshape(-1, self.feature_size) for value in padded["input_values"]]
        return BatchFeature({**padded, "input_values": values}, tensor_type=return_tensors)


def _as_batch(signals: Any, channels: int) -> list[Any]:
    if isinstance(signals, np.ndarray | torch.Tensor):
        single = signals.ndim == 1 or (signals.ndim == 2 and signals.shape[-1] == channels and channels > 1)
        single = single or (signals.ndim == 2 and channels == 1 and signals.shape[-1] == 1)
        return [signals] if single else list(signals)
    if len(signals) == 0:
        raise ValueError("signal: expected at least one signal, found none")
    first = signals[0]
    # A list of numbers is a signal, as is a list of steps that are lists of exactly `channels` numbers.
    if np.ndim(first) == 0:
        return [signals]
    if isinstance(first, list | tuple) and np.ndim(first) == 1 and len(first) == channels:
        return [signals]
    return list(signals)


def check_finite(signal: np.ndarray) -> None:
    """Raises ValueError at the first step of a signal (time, channels) that is not finite."""
    if not np.isfinite(signal).all():
        step = int(np.argwhere(~np.isfinite(signal))[0][0])
        raise ValueError(f"signal: expected finite values, found {signal[step].tolist()} at step {step}")


def _standardize(values: np.ndarray, mean: float | Sequence[float], std: float | Sequence[float]) -> np.ndarray:
    """(values - mean) / std in float32; mean and std are numbers or one per channel, the last axis."""
    return (values - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)


def _check_scale(field: str, value: Any, channels: int, positive: bool = False) -> None:
    numbers = np.asarray(value)
    if (
        numbers.dtype.kind not in "uif"
        or numbers.ndim > 1
        or numbers.size not in (1, channels)
        or not np.isfinite(numbers).all()
    ):
        raise ValueError(f"{field}: expected one number or one per channel ({channels}), found {value!r}")
    if positive and numbers.min() <= 0:
        raise ValueError(f"{field}: expected positive numbers, found {value!r}; a constant channel can have 1")


def _pillow() -> Any:
    # Outside of a try block, transformers would take it for something that signals need too, and advise `pip install PIL`.
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images need Pillow; install it with: pip install pillow") from error
    return Image


def _eight_bit(image: Any) -> Any:
    """The image with 8 bits per channel and no transparency.

    Raises:
        ValueError: it is transparent somewhere, or its values have no known range.
    """
    if image.mode.startswith("I;16"):
        Image = _pillow()
        # convert() would cut everything above 255.
        return Image.fromarray(np.round(np.asarray(image, dtype=np.float64) / 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
            raise ValueError("images: found transparent pixels, whose colour is undefined; put the image on a background")
        return image.convert("RGB")
    if image.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB"):
        raise ValueError(f"images: expected 8 or 16 bits per channel, found mode {image.mode!r}; convert the image")
    return image


def _plain(value: float | Sequence[float]) -> float | list[float]:
    return float(value) if isinstance(value, int | float) else [float(v) for v in value]


# Names this file in the `auto_map` of what is saved, and copies it there. AutoProcessor is not named: it finds either by itself,
# but would ask for trust_remote_code where lmu_hf is installed.
LMUImageProcessor.register_for_auto_class()
LMUFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
