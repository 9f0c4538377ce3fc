"""Settings of a network: frozen values that are checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal


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
        _require(
            0 < self.crop_px <= self.resize_px, f"need 0 < crop_px <= resize_px, got {self.crop_px}, {self.resize_px}"
        )
        _require(
            len(self.mean) == len(self.std) == 3, f"mean and std are per channel, got mean={self.mean}, std={self.std}"
        )
        _require(all(value > 0 for value in self.std), f"std must be positive, got {self.std}")
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
            value, least = getattr(self, size.name), 0 if size.name in ("dropout", "projection_size") else 1
            _require(value >= least, f"{size.name} must be at least {least}, got {value}")
        _require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def attended_size(self) -> int:
        """The size of the features that the decoder attends to."""
        return self.projection_size or self.feature_size
