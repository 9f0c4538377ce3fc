"""Captions -> HTML, for notebooks: the share, in percent, that each frame has in each word.

A word's largest share is the darkest. Colours show on light and on dark pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etenet.captioning.captions import Caption, Sentence

_ACCENT, _DARKEST = "214, 107, 36", 0.7  # red, green, blue; opacity


def of_caption(caption: Caption, thumbnail_urls: Sequence[str]) -> str:
    """The sentences of a clip, and the attention of each word of the best one over the frames."""
    best, *others = caption.sentences
    listed = "".join(f"<li>{escape(other.text)}{_confidence(other)}</li>" for other in others)
    return "".join(
        (
            f'<p style="font-size: 1.5em; margin: 0 0 .2em">{_shown(caption.text)}</p>',
            f"<p>{_confidence(best) or f'log probability {best.log_prob:.2f}'}</p>",
            _attention(best, caption.video.times_s, thumbnail_urls),
            f"<ol start=2>{listed}</ol>" if listed else "",
        )
    )


def of_segments(segments: Iterable[Caption]) -> str:
    rows = "".join(
        f"<tr>{_cell(f'{segment.video.start_s:.2f} to {segment.video.end_s:.2f} s')}"
        f"{_cell(_shown(segment.text))}{_cell(_confidence(segment.sentences[0]))}</tr>"
        for segment in segments
    )
    return f"<table>{rows}</table>"


def _attention(sentence: Sentence, times_s: Sequence[float], thumbnail_urls: Sequence[str]) -> str:
    pictures = "".join(_cell(f'<img src="{url}" alt="" width=48>') for url in thumbnail_urls)
    times = "".join(_cell(f"{time_s:.2f} s") for time_s in times_s)
    rows = []
    for word, prob, weights in zip(sentence.words, sentence.word_probs, sentence.attention, strict=True):
        least, most = min(weights), max(weights)
        shades = "".join(
            f'<td style="background: rgba({_ACCENT}, {_DARKEST * (weight - least) / (most - least or 1):.2f})">'
            f"{100 * weight:.1f}</td>"
            for weight in weights
        )
        rows.append(f"<tr>{_cell(escape(word))}{_cell(f'{100 * prob:.0f} %')}{shades}</tr>")
    above = [f"<tr><td></td><td></td>{cells}</tr>" for cells in (pictures, times) if cells]
    return f'<table style="font-size: .85em">{"".join(above + rows)}</table>'


def _shown(text: str | None) -> str:
    return "<i>withheld: its confidence is too low</i>" if text is None else escape(text)


def _confidence(sentence: Sentence) -> str:
    return "" if sentence.confidence is None else f" {100 * sentence.confidence:.0f} % confident"


def _cell(content: str) -> str:
    return f'<td style="text-align: left">{content}</td>'
