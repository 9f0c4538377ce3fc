"""The scenes of the demo world: the phrases for each, and how its background is painted.

Knows nothing of things or motions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import ImageDraw


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    phrases: tuple[str, ...]
    paint: Callable[[ImageDraw.ImageDraw, np.random.Generator, int, int], None]


def _jitter(rng: np.random.Generator, colour: tuple[int, int, int], amount: int = 18) -> tuple[int, int, int]:
    red, green, blue = (int(np.clip(c + rng.integers(-amount, amount + 1), 0, 255)) for c in colour)
    return red, green, blue


def _gradient(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], top: tuple[int, int, int], bottom: tuple[int, int, int]
) -> None:
    left, upper, right, lower = box
    for y in range(upper, lower):
        share = (y - upper) / max(1, lower - upper - 1)
        colour = tuple(round(a + (b - a) * share) for a, b in zip(top, bottom, strict=True))
        draw.line([(left, y), (right, y)], fill=colour)


def _cloud(draw: ImageDraw.ImageDraw, rng: np.random.Generator, x: float, y: float, size: float) -> None:
    for _ in range(5):
        dx, dy, r = rng.uniform(-size, size), rng.uniform(-size / 4, size / 4), rng.uniform(size / 3, size / 2)
        draw.ellipse(
            [x + dx - r, y + dy - r / 1.6, x + dx + r, y + dy + r / 1.6], fill=_jitter(rng, (245, 247, 250), 6)
        )


def _beach(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int) -> None:
    sea, sand = int(height * rng.uniform(0.25, 0.38)), int(height * rng.uniform(0.5, 0.62))
    _gradient(draw, (0, 0, width, sea), _jitter(rng, (120, 190, 240)), _jitter(rng, (190, 225, 245)))
    _gradient(draw, (0, sea, width, sand), _jitter(rng, (20, 105, 170)), _jitter(rng, (60, 175, 200)))
    _gradient(draw, (0, sand, width, height), _jitter(rng, (235, 210, 150)), _jitter(rng, (215, 180, 115)))
    draw.line([(0, sand), (width, sand)], fill=(250, 250, 245), width=max(2, height // 60))


def _sky(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int) -> None:
    _gradient(draw, (0, 0, width, height), _jitter(rng, (60, 130, 215)), _jitter(rng, (150, 205, 245)))
    for _ in range(int(rng.integers(4, 8))):
        _cloud(draw, rng, rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.08, 0.2) * width)


def _meadow(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int) -> None:
    horizon = int(height * rng.uniform(0.2, 0.35))
    _gradient(draw, (0, 0, width, horizon), _jitter(rng, (135, 200, 245)), _jitter(rng, (205, 235, 250)))
    _gradient(draw, (0, horizon, width, height), _jitter(rng, (95, 170, 60)), _jitter(rng, (50, 120, 35)))
    for _ in range(120):
        x, y = rng.uniform(0, width), rng.uniform(horizon, height)
        draw.line([(x, y), (x + rng.uniform(-2, 2), y - height / 30)], fill=_jitter(rng, (70, 145, 45), 25))


def _snow(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int) -> None:
    horizon = int(height * rng.uniform(0.3, 0.45))
    _gradient(draw, (0, 0, width, horizon), _jitter(rng, (165, 175, 190)), _jitter(rng, (205, 212, 222)))
    _gradient(draw, (0, horizon, width, height), _jitter(rng, (245, 248, 252), 6), _jitter(rng, (222, 230, 242), 8))
    for _ in range(int(rng.integers(3, 7))):
        x, tall = rng.uniform(0, width), height * rng.uniform(0.15, 0.28)
        fir = [(x, horizon - tall), (x - tall / 3, horizon + tall / 5), (x + tall / 3, horizon + tall / 5)]
        draw.polygon(fir, fill=_jitter(rng, (40, 80, 65)))
    for _ in range(90):
        x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.4, 1.4) * height / 150
        draw.ellipse([x - r, y - r, x + r, y + r], fill=(255, 255, 255))


def _street(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int) -> None:
    kerb = int(height * rng.uniform(0.48, 0.6))
    draw.rectangle([0, 0, width, kerb], fill=_jitter(rng, (175, 195, 215)))
    x = 0.0
    while x < width:
        house, top = width * rng.uniform(0.14, 0.26), kerb * rng.uniform(0.1, 0.5)
        draw.rectangle([x, top, x + house, kerb], fill=_jitter(rng, (150, 105, 90), 40))
        for row, column in product(np.arange(top + kerb * 0.08, kerb * 0.85, kerb * 0.2), (0.2, 0.6)):
            left = x + house * column
            draw.rectangle([left, row, left + house * 0.2, row + kerb * 0.1], fill=_jitter(rng, (235, 225, 150)))
        x += house
    draw.rectangle([0, kerb, width, kerb + height // 14], fill=_jitter(rng, (185, 185, 180)))
    draw.rectangle([0, kerb + height // 14, width, height], fill=_jitter(rng, (75, 76, 80)))
    for dash in np.arange(rng.uniform(-0.2, 0), 1, 0.22):
        left, lane = dash * width, kerb + (height - kerb) * 0.6
        draw.rectangle([left, lane, left + width * 0.11, lane + height / 40], fill=(240, 240, 230))


def _room(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int) -> None:
    floor = int(height * rng.uniform(0.62, 0.72))
    wall = _jitter(rng, (225, 190, 165), 20)
    draw.rectangle([0, 0, width, floor], fill=wall)
    for x in np.arange(0, width, width / 14):
        draw.line([(x, 0), (x, floor)], fill=tuple(max(0, c - 14) for c in wall), width=2)
    left, top = width * rng.uniform(0.05, 0.6), height * rng.uniform(0.06, 0.14)
    right, bottom = left + width * 0.28, top + height * 0.34
    draw.rectangle([left - 4, top - 4, right + 4, bottom + 4], fill=(250, 250, 245))
    draw.rectangle([left, top, right, bottom], fill=_jitter(rng, (150, 200, 235)))
    draw.line([((left + right) / 2, top), ((left + right) / 2, bottom)], fill=(250, 250, 245), width=4)
    plank = _jitter(rng, (140, 90, 50))
    draw.rectangle([0, floor, width, height], fill=plank)
    for y in np.arange(floor, height, max(4, height / 22)):
        draw.line([(0, y), (width, y)], fill=tuple(max(0, c - 30) for c in plank), width=2)


SCENES = {
    "beach": Scene(phrases=("on the beach", "at the seaside"), paint=_beach),
    "sky": Scene(phrases=("in the sky", "in front of the clouds"), paint=_sky),
    "meadow": Scene(phrases=("on the grass", "in a green meadow"), paint=_meadow),
    "snow": Scene(phrases=("in the snow", "on a snowy day"), paint=_snow),
    "street": Scene(phrases=("on the street", "in the city"), paint=_street),
    "room": Scene(phrases=("in a room", "in the living room"), paint=_room),
}
