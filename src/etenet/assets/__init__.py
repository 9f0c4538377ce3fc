"""Files that come with the package: small clips, and what stands at the top of the source tree."""

from __future__ import annotations

from pathlib import Path

CANARY_CLIP = Path(__file__).with_name("canary.mp4")  # small, always decodes, and one picture: encoded once
MOVING_CLIP = Path(__file__).with_name("moving.mp4")  # 16 pictures that all differ: what a caption truly takes

PAGE = Path(__file__).with_name("page")

_PACKAGE = Path(__file__).parent.parent
SHARE = "share"  # the folder of an installed package that has what the source tree has at its top


def bundled(name: str) -> Path:
    """A file or folder of the source tree, or its copy inside an installed package."""
    copy = _PACKAGE / SHARE / name
    return copy if copy.exists() else _PACKAGE.parent.parent / name
