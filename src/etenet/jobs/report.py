"""The records of a job -> one HTML file to look at, which needs no other file and no network.

It is written piece by piece, whatever the number of clips. All of it but sorting and filtering works without scripts.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Iterator
from hashlib import sha256
from html import escape
from typing import Any

from etenet.assets import PAGE
from etenet.jobs.journal import Record

THUMBNAIL_PX = 112


def html(records: Iterable[Record]) -> Iterator[bytes]:
    style = "".join((PAGE / name).read_text() for name in ("page.css", "report.css"))
    script = (PAGE / "report.js").read_text()
    top, _, bottom = (PAGE / "report.html").read_text().partition("{{clips}}")
    for name, text in (("policy", _policy(style, script)), ("style", style), ("script", script)):
        top, bottom = (part.replace(f"{{{{{name}}}}}", text) for part in (top, bottom))
    yield top.encode()
    for record in records:
        yield _clip(record).encode(errors="replace")
    yield bottom.encode()


def _policy(style: str, script: str) -> str:
    """Only this style and this script, and pictures that are in the file. Source: CSP Level 3, 6.7.3.3."""
    style_hash, script_hash = (b64encode(sha256(text.encode()).digest()).decode() for text in (style, script))
    return f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}'"


def _clip(record: Record) -> str:
    parts = record.get("segments", [record])
    if error := record.get("error"):
        kind, shown = (
            "failed",
            f'<p class="error">{escape(error["message"])} <small>({escape(error["code"])})</small></p>',
        )
    else:
        kind = "withheld" if all(part["caption"] is None for part in parts) else "captioned"
        shown = "".join(_part(part, in_segments="segments" in record) for part in parts)
    confidence = min((part["confidence"] for part in parts if "confidence" in part), default="")
    name = f'<p class="name">{escape(record["video"])}</p>'
    return f'<li data-kind="{kind}" data-confidence="{confidence}">{name}{shown}</li>\n'


def _part(part: Record, *, in_segments: bool) -> str:
    frames: dict[str, Any] = part.get("frames", {})
    pictures = "".join(
        f'<img src="{escape(url)}" alt="" title="{time_s:.2f} s" loading="lazy">'
        for time_s, url in zip(frames.get("times_s", ()), frames.get("thumbnails", ()), strict=True)
    )
    time = f"<time>{part['start_s']:.1f} to {part['end_s']:.1f} s</time> " if in_segments else ""
    best = part["captions"][0]["caption"] if "captions" in part else ""
    text = f"<i>withheld</i> <del>{escape(best)}</del>" if part["caption"] is None else escape(part["caption"])
    sure = part.get("confidence")
    gauge = "" if sure is None else f'<p class="sure"><meter value="{sure}"></meter> {100 * sure:.0f} % confident</p>'
    said = f'<div><p class="caption">{time}{text}</p>{gauge}</div>'
    return f'<div class="part"><div class="strip">{pictures}</div>{said}</div>'
