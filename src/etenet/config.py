"""Settings as frozen values that cannot be wrong: checked when made, units in the names.

Knows no model and no file; `checkpoint.py` stores what belongs to a model, the handler and the command line
fill in the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from etenet.errors import BadOption
from etenet.segments import WHOLE, Cut

FRAMES_PER_CLIP = 16
MOST_SEGMENTS = 100  # of one request, whatever its limits
CANARY_CLIP = Path(__file__).with_name("canary.mp4")  # small, always decodes, and one picture: encoded once
MOVING_CLIP = Path(__file__).with_name("moving.mp4")  # 16 pictures that all differ: what a caption truly takes

OPTION_HEADERS = {  # of a request, in lower case, and the option of `CaptionOptions` that each stands for
    "x-etenet-beam-size": "beam_size",
    "x-etenet-captions": "captions",
    "x-etenet-max-words": "max_words",
    "x-etenet-length-penalty": "length_penalty",
    "x-etenet-start-s": "start_s",
    "x-etenet-end-s": "end_s",
    "x-etenet-segment-s": "segment_s",
    "x-etenet-segment": "segment",
    "x-etenet-max-segments": "max_segments",
}
ERROR_HEADER = "x-etenet-error"  # of an answer: the code in its body; what TorchServe itself answers has none

FAILURE_FILE_VARIABLE = "ETENET_FAILURE_FILE"  # where a worker says why it cannot start
REQUEST_LOG_VARIABLE = "ETENET_REQUEST_LOG"  # json, plain or off

# How often libgomp's threads look again at a barrier before they sleep. A search passes about a hundred barriers; with
# libgomp's own 300,000 its threads burn the cores that other programs are waiting for. Measured on two cores, p50 of a
# caption: alone 40 ms (37 with libgomp's own, 59 with 1,000, 64 with OMP_WAIT_POLICY=PASSIVE), beside six busy loops
# 330 ms (1,200, 320 and 270).
SPIN_COUNT = "10000"


def thread_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What an environment needs before torch is imported; nothing where the user has decided how threads wait."""
    decided = environment.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    return {} if decided else {"GOMP_SPINCOUNT": SPIN_COUNT}


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
    """Sizes of the soft-attention LSTM. Hidden and embedding sizes are the paper's; the attention size is ours."""

    feature_size: int
    vocabulary_size: int
    hidden_size: int = 512
    embedding_size: int = 486
    attention_size: int = 512
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for size in fields(self):
            value = getattr(self, size.name)
            _require(size.name == "dropout" or value > 0, f"{size.name} must be positive, got {value}")
        _require(0 <= self.dropout < 1, f"dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLimits:
    """What one upload may cost. Header claims are never trusted against these."""

    max_body_bytes: int = 64 * 2**20
    max_pixels: int = 4096 * 2304
    max_memory_bytes: int = 2**30  # what a decoder process may take beyond what it has at its start
    max_packets: int = 200_000
    max_segments: int = 16  # of one video, in one answer
    decode_deadline_s: float = 5.0

    def __post_init__(self) -> None:
        for limit in fields(self):
            _require(getattr(self, limit.name) > 0, f"{limit.name} must be positive, got {getattr(self, limit.name)}")
        _require(self.max_segments <= MOST_SEGMENTS, f"max_segments is at most {MOST_SEGMENTS}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuDecoding:
    """Which videos a GPU's own decoder (NVDEC) takes from the cores.

    Small frames a core decodes faster than they come back from a GPU. That it is the other way round from 1080p on is
    what others publish; `benchmarks.gpu` measures it.
    """

    device: int = 0  # of those that CUDA_VISIBLE_DEVICES leaves
    from_pixels: int = 1920 * 1080  # of a frame

    def __post_init__(self) -> None:
        _require(self.device >= 0, f"device must be a GPU's number, from 0 on, got {self.device}")
        _require(self.from_pixels > 0, f"from_pixels must be positive, got {self.from_pixels}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionOptions:
    """What a client may ask for; out of bounds raises `BadOption`. `max_words` None means the checkpoint's own."""

    beam_size: int = 5
    captions: int = 1
    max_words: int | None = None
    length_penalty: float = 0.0
    cut: Cut = WHOLE

    def __post_init__(self) -> None:
        bounds = {"beam_size": (1, 10), "captions": (1, 10), "max_words": (1, 50), "length_penalty": (0, 2)}
        for name, (lowest, highest) in bounds.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value <= highest:
                raise BadOption(f"{name} must be from {lowest} to {highest}, got {value}")
        if self.captions > self.beam_size:
            raise BadOption(
                f"captions={self.captions} is more than the beam holds; raise beam_size (now {self.beam_size})"
            )

    @classmethod
    def parse(cls, texts: Mapping[str, str]) -> CaptionOptions:
        """From option texts as they come in headers, form fields or on a command line; unknown names are ignored."""
        values = {name: _parsed(name, texts[name], kind) for name, kind in _OPTIONS.items() if name in texts}
        of_cut = {option.name: values.pop(option.name) for option in fields(Cut) if option.name in values}
        return cls(**values, cut=Cut(**of_cut))

    def as_texts(self) -> dict[str, str]:
        """What `parse` makes the same options of; what is not asked for is left out."""
        said, unasked = asdict(self) | asdict(self.cut), asdict(CaptionOptions()) | asdict(WHOLE)
        return {name: str(said[name]) for name in _OPTIONS if said[name] != unasked[name]}


_OPTIONS = {
    **dict.fromkeys(("beam_size", "captions", "max_words", "max_segments"), int),
    **dict.fromkeys(("length_penalty", "start_s", "end_s", "segment_s"), float),
    "segment": str,
}


def _parsed(name: str, text: str, kind: type) -> Any:
    try:
        return kind(text.strip())
    except ValueError as error:
        wanted = "a whole number" if kind is int else "a number"
        raise BadOption(f"{name} must be {wanted}, got {text[:40]!r}") from error
