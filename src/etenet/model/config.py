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

GIVEN_FEATURES = "given features"  # the encoder's name in a checkpoint that was trained on features alone


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


def crop_start(preprocessing: Preprocessing) -> int:
    """First row and column of the centre crop. Halves are rounded to even, as in torchvision's CenterCrop."""
    return round((preprocessing.resize_px - preprocessing.crop_px) / 2)


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

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of a `Decoder`, by the names in its state dict."""
        features, hidden, attention = self.attended_size, self.hidden_size, self.attention_size
        embedding, words = self.embedding_size, self.vocabulary_size
        matrices = {
            "embedding.weight": (words, embedding),
            "attend_hidden.weight": (attention, hidden),
            "attend_feature.weight": (attention, features),
            "attend_score.weight": (1, attention),
            "gate.weight": (1, hidden),
            "to_embedding.weight": (embedding, features + hidden),
            "to_words.weight": (words, embedding),
            "first_hidden.weight": (hidden, features),
            "first_cell.weight": (hidden, features),
            **({"project.weight": (features, self.feature_size)} if self.projection_size else {}),
        }
        without_bias = {"embedding.weight", "attend_hidden.weight"}
        biases = {
            name.replace("weight", "bias"): shape[:1] for name, shape in matrices.items() if name not in without_bias
        }
        lstm = {
            "lstm.weight_ih": (4 * hidden, features + embedding),
            "lstm.weight_hh": (4 * hidden, hidden),
            **dict.fromkeys(("lstm.bias_ih", "lstm.bias_hh"), (4 * hidden,)),
        }
        return {**matrices, **biases, **lstm}
