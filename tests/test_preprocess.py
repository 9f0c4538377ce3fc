"""Preprocessing against the formula, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from etenet.model.config import Preprocessing
from etenet.model.encoder import default_preprocessing
from etenet.model.preprocess import preprocess


def frames(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 16, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_preprocessing_crops_the_centre_and_normalises() -> None:
    preprocessing = Preprocessing(resize_px=314, crop_px=299, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    pixels = frames(314)
    result = preprocess(pixels, preprocessing)
    assert result.shape == (2, 16, 3, 299, 299)
    expected = (pixels[:, :, 8:307, 8:307].numpy() / 255 - 0.5) / 0.5
    np.testing.assert_allclose(result.numpy(), expected.transpose(0, 1, 4, 2, 3), atol=1e-6)


def test_preprocessing_supports_networks_trained_on_bgr_bytes() -> None:
    preprocessing = Preprocessing(
        resize_px=10, crop_px=6, mean=(104.0, 117.0, 128.0), std=(1.0, 1.0, 1.0), input_max=255.0, channels="BGR"
    )
    pixels = frames(10)
    expected = pixels[..., 2:8, 2:8, :].flip(-1).numpy() - np.array([104.0, 117.0, 128.0])
    np.testing.assert_allclose(preprocess(pixels, preprocessing).numpy(), expected.transpose(0, 1, 4, 2, 3), atol=1e-4)


@pytest.mark.parametrize("name", ["timm:tf_efficientnet_lite0", "timm:tf_efficientnet_lite2"])
def test_efficientnet_lite_gets_what_google_trained_it_on(name: str) -> None:
    preprocessing = default_preprocessing(name, crop_px=6)
    pixels = frames(preprocessing.resize_px)
    expected = (pixels[..., :6, :6, :].numpy().astype(np.float32) - 127) / 128
    assert np.array_equal(preprocess(pixels, preprocessing).numpy(), expected.transpose(0, 1, 4, 2, 3))


def test_frames_of_another_size_are_refused() -> None:
    preprocessing = Preprocessing(resize_px=10, crop_px=6, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="10, 10, 3"):
        preprocess(frames(11), preprocessing)


@pytest.mark.parametrize("wrong", [{"crop_px": 11}, {"crop_px": 0}, {"std": (0.5, 0.0, 0.5)}, {"channels": "GBR"}])
def test_invalid_settings_are_refused(wrong: dict[str, object]) -> None:
    good = {"resize_px": 10, "crop_px": 6, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        Preprocessing(**(good | wrong))  # type: ignore[arg-type]
