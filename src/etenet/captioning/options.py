"""What a client may ask for: one table, from which the parser, the bounds, the headers and the flags are made.

Knows no HTTP and no command line. A test holds docs/openapi.yaml to the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from etenet.errors import BadOption
from etenet.model.config import WIDEST_BEAM
from etenet.video.segments import SHORTEST_SEGMENT_S, WHOLE, Cut

if TYPE_CHECKING:
    from etenet.model.confidence import Calibration

HEADER_PREFIX = "X-Etenet-"  # of requests: no header that is not an option begins with it

_SHOWN_LETTERS = 40
_OF_CUT = {field.name for field in fields(Cut)}  # which checks them itself


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One option: its form field has its own name, its header and its flag have names made from that."""

    name: str  # of a field of `CaptionOptions` or of its `Cut`
    kind: type[int] | type[float] | type[str]
    help: str
    least: float = -math.inf
    most: float = math.inf
    choices: tuple[str, ...] = ()
    otherwise: str = ""  # what happens without it, where the default is no number
    is_flag: bool = True  # of `etenet caption`; the others come from a list of clips or from the job

    @property
    def header(self) -> str:
        """Of a request, matched without regard to case."""
        return f"{HEADER_PREFIX}{self.name.replace('_', '-').title()}"

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def range(self) -> str:
        if self.choices:
            return " or ".join(self.choices)
        return f"{self.least:g} to {self.most:g}" if self.most < math.inf else f"at least {self.least:g}"

    @property
    def default(self) -> int | float | None:
        """The value that stands for "not set"; None where that is no number."""
        value = _values(CaptionOptions())[self.name]
        return None if value is None or math.isinf(value) else value

    @property
    def usage(self) -> str:
        """The line for `--help`, which shows choices itself."""
        bounds = "" if self.choices else f"{self.range}, "
        default = f"default: {self.otherwise}" if self.default is None else f"default {self.default:g}"
        return f"{self.help}; {bounds}{default}"

    def check(self, value: Any) -> None:
        """Raises `BadOption` for a value of another type, or out of bounds. NumPy's numbers are numbers, too."""
        if value is None and self.otherwise:
            return
        is_of_kind = isinstance(value, Integral if self.kind is int else Real)
        if not is_of_kind:
            raise BadOption(f"{self.name} must be {self._number}, got {value!r}")
        if not self.least <= value <= self.most:
            raise BadOption(f"{self.name} must be from {self.range}, got {value}")

    def parse(self, text: str) -> Any:
        """Of the option's type; the bounds are checked where the values meet: in `CaptionOptions` and in `Cut`."""
        try:
            return self.kind(text.strip())
        except ValueError as error:
            raise BadOption(f"{self.name} must be {self._number}, got {text[:_SHOWN_LETTERS]!r}") from error

    @property
    def _number(self) -> str:
        return "a whole number" if self.kind is int else "a number"


OPTIONS = (
    Option(name="beam_size", kind=int, least=1, most=WIDEST_BEAM, help="sentences kept while searching"),
    Option(
        name="captions", kind=int, least=1, most=WIDEST_BEAM, help="how many of them to return, at most the beam size"
    ),
    Option(name="max_words", kind=int, least=1, most=50, otherwise="the checkpoint's", help="longest sentence"),
    Option(name="length_penalty", kind=float, least=0, most=2, help="divide log_prob by the length to this power"),
    Option(
        name="min_confidence",
        kind=float,
        least=0,
        most=1,
        help="give null instead of a caption whose confidence is lower",
    ),
    Option(name="start_s", kind=float, least=0, is_flag=False, help="leave out what is shown before"),
    Option(
        name="end_s", kind=float, least=0.001, otherwise="the end", is_flag=False, help="leave out what is shown after"
    ),
    Option(
        name="segment_s",
        kind=float,
        least=SHORTEST_SEGMENT_S,
        otherwise="one caption",
        help="caption each segment of this many seconds",
    ),
    Option(name="segment", kind=str, choices=("scenes",), otherwise="one caption", help="caption each scene"),
    Option(
        name="max_segments",
        kind=int,
        least=1,
        otherwise="all",
        is_flag=False,
        help="return this many segments and leave the rest for another request",
    ),
    Option(
        name="thumbnails",
        kind=int,
        least=16,
        most=128,
        otherwise="no pictures",
        is_flag=False,
        help="return the frames as JPEGs whose longer side has this many pixels",
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionOptions:
    """What a client may ask for; out of bounds raises `BadOption`.

    `max_words` None means the checkpoint's own, and `thumbnails` None no pictures.
    """

    beam_size: int = 5
    captions: int = 1
    max_words: int | None = None
    length_penalty: float = 0.0
    min_confidence: float = 0.0
    thumbnails: int | None = None
    cut: Cut = WHOLE

    def __post_init__(self) -> None:
        for option in OPTIONS:
            if option.name not in _OF_CUT:
                option.check(getattr(self, option.name))
        if not isinstance(self.cut, Cut):
            raise BadOption(f"cut must be a Cut, got {self.cut!r}")
        if self.captions > self.beam_size:
            raise BadOption(
                f"captions={self.captions} is more than the beam holds; raise beam_size (now {self.beam_size})"
            )

    def refusal(self, calibration: Calibration | None) -> BadOption | None:
        """Why a checkpoint with this calibration cannot do it; None if it can."""
        if not self.min_confidence:
            return None
        if calibration is None:
            return BadOption(
                f"min_confidence={self.min_confidence:g} needs a checkpoint with a calibration, and this one has none; "
                "leave min_confidence out, or make a calibration with training.calibrate"
            )
        if self.beam_size < calibration.beam_size:
            return BadOption(
                f"min_confidence={self.min_confidence:g} needs a beam_size of at least {calibration.beam_size}, "
                f"got {self.beam_size}; raise beam_size, or leave min_confidence out"
            )
        return None

    @classmethod
    def parse(cls, texts: Mapping[str, str]) -> CaptionOptions:
        """From option texts as they come in headers, form fields or on a command line; unknown names are ignored."""
        values = {option.name: option.parse(texts[option.name]) for option in OPTIONS if option.name in texts}
        of_cut = {name: values.pop(name) for name in _OF_CUT & values.keys()}
        return cls(**values, cut=Cut(**of_cut))

    def as_texts(self) -> dict[str, str]:
        """What `parse` makes the same options of; options at their default are left out."""
        values, defaults = _values(self), _values(CaptionOptions())
        return {o.name: str(values[o.name]) for o in OPTIONS if values[o.name] != defaults[o.name]}

    def as_headers(self) -> dict[str, str]:
        """The headers of a request for the same."""
        texts = self.as_texts()
        return {option.header: texts[option.name] for option in OPTIONS if option.name in texts}


def unknown_option(name: str, names: Iterable[str], kind: str) -> BadOption:
    """The refusal of a name that no option has, as a `kind` of thing. It says which of the names comes nearest."""
    shown = name[:_SHOWN_LETTERS]  # to compare long texts takes long
    (nearest,) = get_close_matches(shown, names, n=1, cutoff=0)
    return BadOption(f"there is no {kind} {shown}; the nearest one is {nearest}")


def _values(options: CaptionOptions) -> dict[str, Any]:
    return asdict(options) | asdict(options.cut)
