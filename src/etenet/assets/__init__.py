"""Small clips that come with the package."""

from __future__ import annotations

from pathlib import Path

CANARY_CLIP = Path(__file__).with_name("canary.mp4")  # small, always decodes, and one picture: encoded once
MOVING_CLIP = Path(__file__).with_name("moving.mp4")  # 16 pictures that all differ: what a caption truly takes
