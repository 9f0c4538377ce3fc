"""Some clips -> a picture like the paper's figure 3: frames, how much the network looked at each, and the captions."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from textwrap import wrap

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from training.evaluation.examples import ReportedClip

COLUMNS, TILE_IN, GAP_IN = 8, 0.8, 0.04
LINE_IN = 0.17  # of text
TEXT_AT_IN = COLUMNS * TILE_IN + 0.15
WIDTH_IN, ROW_IN = TEXT_AT_IN + 5.2, 2 * TILE_IN + 4 * LINE_IN
LETTERS_PER_LINE = 84
REFERENCES_SHOWN = 3
FIGURES_SHOWN = ("CIDEr", "METEOR")


def png(sections: Mapping[str, Sequence[ReportedClip]]) -> bytes:
    """heading -> clips with frames. A clip is a row: its frames in order, under each the share of the attention that
    all words pay to it, then the caption by each name and some references."""
    listed = [(heading, clip) for heading, clips in sections.items() for clip in clips]
    figure = Figure(figsize=(WIDTH_IN, ROW_IN * len(listed)))
    for number, (heading, clip) in enumerate(reversed(listed)):
        top_in = (number + 1) * ROW_IN - 0.1
        _draw_frames(figure, clip, top_in)
        _draw_text(figure, heading, clip, top_in)
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # that the font lacks: it shows a box
        figure.savefig(image, dpi=100, format="png")
    return image.getvalue()


def _draw_frames(figure: Figure, clip: ReportedClip, top_in: float) -> None:
    """Tiles from the left, each with a bar and its share below."""
    assert clip.frames is not None
    _, height_in = figure.get_size_inches()
    shares = [0.0] * len(clip.frames) if clip.attention is None else clip.attention.mean.tolist()
    side_in = TILE_IN - GAP_IN
    for number, (frame, share) in enumerate(zip(clip.frames, shares, strict=True)):
        line, column = divmod(number, COLUMNS)
        left_in, bottom_in = GAP_IN + column * TILE_IN, top_in - (line + 1) * TILE_IN - line * 1.5 * LINE_IN
        panel = figure.add_axes(
            (left_in / WIDTH_IN, bottom_in / height_in, side_in / WIDTH_IN, side_in / height_in), xticks=[], yticks=[]
        )
        panel.imshow(frame, aspect="auto")
        at = (left_in / WIDTH_IN, (bottom_in - 0.08) / height_in)
        figure.add_artist(Rectangle(at, share * side_in / WIDTH_IN, 0.05 / height_in, color="tab:blue"))
        figure.text(at[0], at[1] - 0.02 / height_in, f"{100 * share:.0f} %", fontsize=6, va="top")


def _draw_text(figure: Figure, heading: str, clip: ReportedClip, top_in: float) -> None:
    _, height_in = figure.get_size_inches()
    figures = [f"{name} {100 * value:.0f}" for name, value in clip.scores.items() if name in FIGURES_SHOWN]
    lines = [
        (f"{clip.video}: {', '.join([heading, *figures])}", "normal"),
        *((f"{name}: {caption}", "bold") for name, caption in clip.captions.items()),
        *((f"reference: {reference}", "normal") for reference in clip.references[:REFERENCES_SHOWN]),
    ]
    wrapped = [(part, weight) for line, weight in lines for part in wrap(line, LETTERS_PER_LINE)[:2]]
    for number, (part, weight) in enumerate(wrapped):
        at = (TEXT_AT_IN / WIDTH_IN, (top_in - number * LINE_IN) / height_in)
        figure.text(*at, part, fontsize=8, va="top", weight=weight, parse_math=False)
