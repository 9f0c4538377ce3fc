"""An evaluation -> `report.html`, a self-contained page: scores, the table, then clips with captions and attention.

A pure function of values. Captions and references are not trusted: they are escaped, and the page's security policy
allows only its own style and pictures.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.evaluation.examples import Attention, ReportedClip
from training.evaluation.table import HEADINGS, Row

FRAME_SIZE_PX = 160

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, CanvasText 15%, Canvas);
        --soft: color-mix(in srgb, CanvasText 65%, Canvas); }
body { max-width: 46rem; margin: 3rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }
h1, h2 { font-weight: 600; line-height: 1.2; }
h2 { margin-top: 3rem; }
dl { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin: .5rem 0; font-variant-numeric: tabular-nums; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; }
header dd { font-size: 1.5rem; }
article { border-top: 1px solid var(--line); padding: 1.25rem 0; overflow-wrap: anywhere; }
article dl > div { display: flex; gap: .4rem; align-items: baseline; font-size: .85rem; }
.frames { display: flex; flex-wrap: wrap; gap: .3rem; }
.frames img { border-radius: .25rem; width: 100%; height: auto; display: block; }
figure { margin: 0; flex: 0 1 6.6rem; min-width: 4.5rem; }
figcaption { color: var(--soft); font: .7rem ui-monospace, monospace; }
figcaption i { display: block; height: .35rem; margin: .15rem 0; border-radius: .2rem; background: LinkText; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { font-weight: 400; text-align: left; }
td, .words th[scope=col] { text-align: right; }
.scores { margin: 1.5rem 0; width: 100%; }
.scores th, .scores td { border-bottom: 1px solid var(--line); padding: .3rem .5rem .3rem 0; }
.words th, .words td { padding: .1rem .4rem; }
summary { color: var(--soft); font-size: .85rem; }
p span { color: var(--soft); font-size: .85rem; margin-right: .4rem; }
.beside { margin: .3rem 0 0; }
.caption { font-size: 1.25rem; margin: .6rem 0 .3rem; }
ul { margin: 0; padding-left: 1.2rem; color: var(--soft); }
.video { color: var(--soft); font: .8rem ui-monospace, monospace; margin: 0 0 .5rem; }
</style>
"""


def html(
    title: str,
    metrics: Mapping[str, float],
    sections: Mapping[str, Sequence[ReportedClip]],
    rows: Sequence[Row] = (),
) -> str:
    """The page: `metrics`, the table if it has more than one row, and the clips under their headings."""
    return "".join(
        (
            f"{_HEAD}<title>{_text(title)}</title>\n</head>\n<body>\n",
            f"<header>\n<h1>{_text(title)}</h1>\n{_numbers(metrics)}</header>\n",
            _table(rows) if len(rows) > 1 else "",
            *(_section(heading, clips) for heading, clips in sections.items() if clips),
            "</body>\n</html>\n",
        )
    )


def _table(rows: Sequence[Row]) -> str:
    """Scores in percent, a row for each baseline and checkpoint."""
    head = "".join(f'<th scope="col">{_text(heading)}</th>' for heading in HEADINGS)
    lines = "".join(
        f'<tr><th scope="row">{_text(row.cells[0])}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in row.cells[1:])}'
        "</tr>\n"
        for row in rows
    )
    return f'<table class="scores">\n<tr>{head}</tr>\n{lines}</table>\n'


def _section(heading: str, clips: Sequence[ReportedClip]) -> str:
    return f"<section>\n<h2>{_text(heading)}</h2>\n{''.join(map(_article, clips))}</section>\n"


def _article(clip: ReportedClip) -> str:
    *others, (name, caption) = clip.captions.items()
    before = "".join(
        f'<p class="beside" dir="auto"><span>{_text(name)}</span> {_text(caption)}</p>\n' for name, caption in others
    )
    by = f"<span>{_text(name)}</span> " if others else ""
    references = "".join(f'<li dir="auto">{_text(reference)}</li>\n' for reference in clip.references)
    return (
        f'<article>\n<p class="video">{_text(clip.video)}</p>\n'
        f"{'' if clip.frames is None else _pictures(clip.frames, clip.attention)}"
        f'{before}<p class="caption" dir="auto">{by}{_text(caption)}</p>\n'
        f"{'' if clip.attention is None else _words(clip.attention)}"
        f"<ul>\n{references}</ul>\n{_numbers(clip.scores)}</article>\n"
    )


def _pictures(frames: NDArray[np.uint8], attention: Attention | None) -> str:
    """frames (n, H, W, 3) in order, under each a bar: the share of the attention that all words together pay to it."""
    shares = [None] * len(frames) if attention is None else attention.mean.tolist()
    figures = "".join(
        f"<figure>{_picture(frame, f'frame {number} of {len(frames)}')}{'' if share is None else _bar(share)}</figure>"
        for number, (frame, share) in enumerate(zip(frames, shares, strict=True), start=1)
    )
    return f'<div class="frames">{figures}</div>\n'


def _bar(share: float) -> str:
    return f'<figcaption><i style="width:{100 * share:.1f}%"></i>{100 * share:.0f} %</figcaption>'


def _words(attention: Attention) -> str:
    """A row for each word, a column for each frame; the darker, the more attention."""
    frames = range(1, 1 + attention.weights.shape[1])
    head = "".join(f'<th scope="col">{number}</th>' for number in frames)
    lines = "".join(
        f'<tr><th scope="row" dir="auto">{_text(word)}</th>'
        + "".join(
            f'<td style="background:color-mix(in srgb, LinkText {100 * weight:.0f}%, Canvas)">{100 * weight:.0f}</td>'
            for weight in weights
        )
        + "</tr>\n"
        for word, weights in zip(attention.words, attention.weights.tolist(), strict=True)
    )
    return (
        "<details>\n<summary>attention of each word, in percent by frame</summary>\n"
        f'<table class="words">\n<tr><th scope="col">word</th>{head}</tr>\n{lines}</table>\n</details>\n'
    )


def _picture(frame: NDArray[np.uint8], what: str) -> str:
    """frame (H, W, 3) -> an image no larger than `FRAME_SIZE_PX`, embedded in the page."""
    picture, jpeg = Image.fromarray(np.ascontiguousarray(frame)), io.BytesIO()
    picture.thumbnail((FRAME_SIZE_PX, FRAME_SIZE_PX))
    picture.save(jpeg, "JPEG", quality=80)
    data = base64.b64encode(jpeg.getvalue()).decode()
    width, height = picture.size
    return f'<img alt="{what}" width="{width}" height="{height}" src="data:image/jpeg;base64,{data}">'


def _numbers(numbers: Mapping[str, float]) -> str:
    entries = (
        f"<div><dt>{_text(name)}</dt><dd>{value if isinstance(value, int) else f'{value:.3f}'}</dd></div>\n"
        for name, value in numbers.items()
    )
    return f"<dl>\n{''.join(entries)}</dl>\n"


def _text(text: str) -> str:
    """Escape a text, and replace lone surrogates: JSON may hold them, UTF-8 cannot."""
    return escape(text.encode(errors="replace").decode())
