"""Captions of a split -> `report.html`, a self-contained page: the metrics, then clips with their captions.

A pure function of values. Captions and references are not trusted: they are escaped, and the page's security policy
allows only its own style and pictures.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RANK_BY = "CIDEr"
FRAMES_SHOWN = 4
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
.frames img { border-radius: .25rem; max-width: 100%; }
.caption { font-size: 1.25rem; margin: .6rem 0 .3rem; }
ul { margin: 0; padding-left: 1.2rem; color: var(--soft); }
.video { color: var(--soft); font: .8rem ui-monospace, monospace; margin: 0 0 .5rem; }
</style>
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportedClip:
    """A clip, its caption and its references. `frames` are RGB, (L, H, W, 3), or None if there are only features."""

    video: str
    frames: NDArray[np.uint8] | None
    caption: str
    references: Sequence[str]
    scores: Mapping[str, float]


def html(title: str, metrics: Mapping[str, float], clips: Sequence[ReportedClip], *, count: int = 8) -> str:
    """The page: `metrics`, then the `count` best and the `count` worst clips by CIDEr.

    If a clip has no CIDEr, the first `2 * count` in the order given.
    """
    if all(RANK_BY in clip.scores for clip in clips):
        ranked = sorted(clips, key=lambda clip: clip.scores[RANK_BY], reverse=True)
        best, rest = ranked[:count], ranked[count:]
        sections = {f"Best by {RANK_BY}": best, f"Worst by {RANK_BY}": rest[::-1][:count]}
    else:
        sections = {"Examples": list(clips[: 2 * count])}
    return "".join(
        (
            f"{_HEAD}<title>{_text(title)}</title>\n</head>\n<body>\n",
            f"<header>\n<h1>{_text(title)}</h1>\n{_numbers(metrics)}</header>\n",
            *(_section(heading, shown) for heading, shown in sections.items() if shown),
            "</body>\n</html>\n",
        )
    )


def _section(heading: str, clips: Sequence[ReportedClip]) -> str:
    return f"<section>\n<h2>{_text(heading)}</h2>\n{''.join(map(_article, clips))}</section>\n"


def _article(clip: ReportedClip) -> str:
    references = "".join(f'<li dir="auto">{_text(reference)}</li>\n' for reference in clip.references)
    return (
        f'<article>\n<p class="video">{_text(clip.video)}</p>\n'
        f"{'' if clip.frames is None else _pictures(clip.frames)}"
        f'<p class="caption" dir="auto">{_text(clip.caption)}</p>\n'
        f"<ul>\n{references}</ul>\n{_numbers(clip.scores)}</article>\n"
    )


def _pictures(frames: NDArray[np.uint8]) -> str:
    """frames (L, H, W, 3) -> `FRAMES_SHOWN` of them, from the first to the last."""
    shown = np.linspace(0, len(frames) - 1, min(FRAMES_SHOWN, len(frames))).round().astype(int)
    pictures = "".join(_picture(frames[i], f"frame {i + 1} of {len(frames)}") for i in shown)
    return f'<div class="frames">{pictures}</div>\n'


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
