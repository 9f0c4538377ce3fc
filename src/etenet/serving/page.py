"""The files of the page and their headers. nginx serves the same files, from `deploy/nginx/page`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from etenet.assets import PAGE as FOLDER

# A test holds deploy/nginx/nginx.conf to these.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; media-src blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    content: bytes
    content_type: str


def page() -> Mapping[str, PageFile]:
    """The files by the paths of their URLs."""
    types = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
    files = {
        f"/{name}": PageFile((FOLDER / name).read_bytes(), f"{kind}; charset=utf-8") for name, kind in types.items()
    }
    return files | {"/": files["/index.html"]}
