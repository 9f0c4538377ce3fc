"""Settings of a network: frozen values that are checked when they are made. All errors are `ValueError`.

The upper bounds are far above what anyone uses: a checkpoint that is beyond them is damaged.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

MAX_FRAME_PX = 4096
MAX_LAYER_SIZE = 2**20
MAX_WORDS = 1000  # of a sentence
WIDEST_BEAM = 10


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """It is a whole number in these bounds."""
    _require(
        type(value) is int and least <= value <= most,
        f"{name} must be a whole number from {least} to {most}, got {value!r}",
    )


def check_number(name: str, value: object, least: float = -1e6, most: float = 1e6) -> None:
    """It is a number in these bounds."""
    _require(
        type(value) in (int, float) and isinstance(value, int | float) and least <= value <= most,
        f"{name} must be a number from {least:g} to {most:g}, got {value!r}",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How frames become encoder input: resize (both sides), centre crop, scale, normalise.

    A pixel x in 0..255 becomes (x / 255 * input_max - mean) / std, per channel.
    """

    resize_px: int
    crop_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    input_max: float = 1.0
    channels: Literal["RGB", "BGR"] = "RGB"

    def __post_init__(self) -> None:
        check_whole("resize_px", self.resize_px, 1, MAX_FRAME_PX)
        check_whole("crop_px", self.crop_px, 1, self.resize_px)
        _require(
            len(self.mean) == len(self.std) == 3, f"mean and std are per channel, got mean={self.mean}, std={self.std}"
        )
        for value in self.mean:
            check_number("mean", value)
        for value in self.std:
            check_number("std", value, 1e-6)
        check_number("input_max", self.input_max, 1e-6)
        _require(self.channels in ("RGB", "BGR"), f"channels is RGB or BGR, got {self.channels!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Sizes of the soft-attention LSTM. Hidden and embedding sizes are the paper's; the attention size is ours.

    `projection_size` 0 is the paper's: the decoder attends to the encoder's features as they are.
    """

    feature_size: int
    vocabulary_size: int
    hidden_size: int = 512
    embedding_size: int = 486
    attention_size: int = 512
    projection_size: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for size in fields(self):
            if size.name != "dropout":
                least = 0 if size.name == "projection_size" else 1
                check_whole(size.name, getattr(self, size.name), least, MAX_LAYER_SIZE)
        check_number("dropout", self.dropout, 0, 1)
        _require(self.dropout < 1, f"dropout must be below 1, got {self.dropout}")

    @property
    def attended_size(self) -> int:
        """The size of the features that the decoder attends to."""
        return self.projection_size or self.feature_size
