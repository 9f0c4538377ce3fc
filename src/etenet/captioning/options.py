"""What a client may ask for: options, their headers and their bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from etenet.errors import BadOption
from etenet.video.segments import WHOLE, Cut

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
