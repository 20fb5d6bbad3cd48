"""Images and signals to model inputs, and the Auto classes that find the right processor for a checkpoint."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, pipeline

from lmu_hf import LMUConfig, LMUFeatureExtractor, LMUForSequenceClassification, LMUImageProcessor


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (4, 6), dtype=np.uint8)


def processor(**kwargs):
    return LMUImageProcessor(**{"size": {"height": 4, "width": 6}, **kwargs})


def test_pixels_in_order(pixels):
    values = processor()(pixels, return_tensors="pt")["input_values"]
    assert values.shape == (1, 24, 1)
    assert values.dtype == torch.float32
    assert np.allclose(values[0, :, 0], pixels.reshape(-1) / 255, atol=1e-7)


def test_permutation_scaling_and_every_input_kind(pixels):
    order = np.random.default_rng(1).permutation(24).tolist()
    ours = processor(permutation=order, image_mean=0.5, image_std=0.25)
    expected = ((pixels.reshape(-1) / 255 - 0.5) / 0.25)[order]
    kinds = [pixels, Image.fromarray(pixels), torch.from_numpy(pixels), pixels[..., None], pixels.astype(np.float64)]
    for kind in kinds:
        assert np.allclose(ours(kind)["input_values"][0][:, 0], expected, atol=1e-6)
    assert ours(kinds[:2], return_tensors="np")["input_values"].shape == (2, 24, 1)


def test_colour():
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    ours = processor(image_mode="RGB", image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 2.0, 3.0])
    values = ours(image, return_tensors="np")["input_values"]
    expected = (image.reshape(24, 3) / 255 - np.array([0.1, 0.2, 0.3])) / np.array([1.0, 2.0, 3.0])
    assert np.allclose(values[0], expected, atol=1e-6)
    assert np.array_equal(values, ours(np.moveaxis(image, -1, 0), return_tensors="np")["input_values"])


def test_resize(pixels):
    larger = np.kron(pixels, np.ones((2, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match="expected 6 x 4 pixels, found 12 x 8"):
        processor()(larger)
    assert processor(do_resize=True)(larger, return_tensors="np")["input_values"].shape == (1, 24, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: processor(permutation=[0, 1, 2]), "every number of 0 .. 23 once, found 3 entries"),
        (lambda: processor(permutation=[0] * 24), "24 entries with 1 different"),
        (lambda: processor(size={"height": 4}), "size: expected"),
        (lambda: processor(image_mode="CMYK"), "image_mode: expected"),
        (lambda: processor()(np.full((4, 6), np.nan)), "found NaN"),
        (lambda: processor()(np.full((4, 6), 300)), "within 0..255"),
        (lambda: processor()(np.full((4, 6), 0.5)), "multiply by 255"),
        (lambda: processor()([]), "at least one image"),
        (lambda: processor()(np.zeros((2, 4, 6, 3))), "expected .height, width"),
        (lambda: processor()(np.zeros((4, 6)), do_flip=True), "unknown arguments .'do_flip'"),
        (lambda: LMUFeatureExtractor(std=0.0), "std: expected positive"),
        (lambda: LMUFeatureExtractor(2, mean=[1.0, 2.0, 3.0]), "one per channel .2."),
        (lambda: LMUFeatureExtractor()(np.array([1.0, np.inf])), "found .inf. at step 1"),
        (lambda: LMUFeatureExtractor(3)([np.zeros((5, 2))]), "channels=3., found .5, 2."),
        (lambda: LMUFeatureExtractor()([]), "at least one signal"),
        (lambda: LMUFeatureExtractor(sampling_rate=16000)(np.zeros(5), sampling_rate=8000), "expected 16000 .* found 8000"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("channels", [1, 2])
def test_signals_are_scaled_and_padded(channels, side):
    rng = np.random.default_rng(0)
    signals = [rng.normal(3, 2, (length, channels)) for length in (5, 9, 2)]
    ours = LMUFeatureExtractor.fit(signals, padding_side=side)
    batch = ours(signals, return_tensors="pt")
    assert batch["input_values"].shape == (3, 9, channels)
    assert batch["attention_mask"].sum(1).tolist() == [5, 9, 2]
    valid = batch["input_values"][batch["attention_mask"].bool()]
    assert torch.allclose(valid.mean(0), torch.zeros(channels), atol=1e-5)
    assert torch.allclose(valid.std(0, correction=0), torch.ones(channels), atol=1e-5)
    first = batch["input_values"][0][batch["attention_mask"][0].bool()]
    assert np.allclose(first, (signals[0] - ours.mean) / ours.std, atol=1e-5)


def test_a_signal_by_itself():
    for signal in ([0.0, 1.0, 2.0], np.arange(3.0), torch.arange(3.0), np.arange(3.0)[:, None]):
        assert LMUFeatureExtractor()(signal, return_tensors="np")["input_values"].shape == (1, 3, 1)
    assert LMUFeatureExtractor(2)([[0.0, 1.0], [2.0, 3.0]], return_tensors="np")["input_values"].shape == (1, 2, 2)
    assert LMUFeatureExtractor()(np.zeros((2, 5)), return_tensors="np")["input_values"].shape == (2, 5, 1)
    cut = LMUFeatureExtractor()(np.zeros(9), padding="max_length", max_length=4, truncation=True, return_tensors="np")
    assert cut["input_values"].shape == (1, 4, 1)


@pytest.mark.parametrize(
    ("saved", "auto"),
    [
        (processor(permutation=list(range(23, -1, -1)), image_mean=0.3), AutoImageProcessor),
        (LMUFeatureExtractor(mean=2.0, std=3.0, sampling_rate=100, padding_side="left"), AutoFeatureExtractor),
    ],
    ids=["image", "signal"],
)
def test_saved_beside_the_model(saved, auto, tmp_path):
    LMUForSequenceClassification(LMUConfig(order=4, theta=24, hidden_size=3)).save_pretrained(tmp_path)
    saved.save_pretrained(tmp_path)
    for cls in (type(saved), auto, AutoProcessor):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is type(saved)
        assert loaded.to_dict() == saved.to_dict()
    other = AutoFeatureExtractor if auto is AutoImageProcessor else AutoImageProcessor
    with pytest.raises(ValueError, match="this checkpoint takes"):
        other.from_pretrained(tmp_path)


def test_pipelines(tmp_path, pixels):
    model = LMUForSequenceClassification(LMUConfig(order=4, theta=24, hidden_size=3, num_labels=3)).eval()
    model.save_pretrained(tmp_path)
    processor().save_pretrained(tmp_path)
    image = Image.fromarray(pixels)
    scores = {entry["label"]: entry["score"] for entry in pipeline("image-classification", model=str(tmp_path))(image)}
    expected = model(**processor()(image, return_tensors="pt")).logits.softmax(-1)[0]
    assert [scores[f"LABEL_{i}"] for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-6)
    LMUFeatureExtractor(sampling_rate=100).save_pretrained(tmp_path)
    signal = np.sin(np.arange(50) / 5).astype(np.float32)
    scores = {entry["label"]: entry["score"] for entry in pipeline("audio-classification", model=str(tmp_path))(signal)}
    expected = model(input_values=torch.from_numpy(signal)[None]).logits.softmax(-1)[0]
    assert [scores[f"LABEL_{i}"] for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-6)
