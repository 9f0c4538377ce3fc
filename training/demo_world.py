"""The demo world: things that do simple things in simple scenes, rendered as H.264 clips with reference sentences.

A clip is a combination of one thing, one motion and one scene; everything else about it (size, place, speed,
colours, noise, compression, frame rate, frame size) is drawn at random from a seed. Whole combinations are held
out for validation and test, so a test clip never shows a combination that training has seen.

The decoder sees frames as a set, so every motion here is visible in a shuffled set of frames: there is a
rise but no fall, a crossing but no left or right.

This file does not know how clips are cached or trained on (`prepare`, `train`).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

import av
import numpy as np
from PIL import Image, ImageDraw

from etenet.vocabulary import words

Split = Literal["train", "validation", "test"]

THINGS_ATLAS = Path(__file__).with_name("demo_things.png")
GLYPH_PX = 128
REFERENCES_PER_CLIP = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """Something to draw. The first noun names the thing; `going` is how it crosses the frame."""

    emoji: str
    nouns: tuple[str, ...]
    going: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """Where the thing is at one moment. Places are fractions of the frame, `scale` of its shorter side."""

    x: float
    y: float
    scale: float
    turn_deg: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Motion:
    """`pose` takes the progress through the clip (0 to 1) and the clip's random choices."""

    phrases: tuple[str, ...]
    pose: Callable[[float, Course], Pose]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    phrases: tuple[str, ...]
    paint: Callable[[ImageDraw.ImageDraw, np.random.Generator, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """The random choices that a motion may use, drawn once per clip."""

    x: float
    y: float
    scale: float
    cycles: float
    phase: float
    direction: int


@dataclass(frozen=True, slots=True)
class Combination:
    thing: str
    motion: str
    scene: str


@dataclass(frozen=True, slots=True)
class DemoClip:
    """A clip that can be rendered: (combination, seed) says all about it."""

    name: str
    split: Split
    combination: Combination
    seed: int


THINGS = {
    thing.nouns[0]: thing
    for thing in (
        Thing(emoji="🐕", nouns=("dog", "puppy"), going="running"),
        Thing(emoji="🐈", nouns=("cat", "kitty"), going="walking"),
        Thing(emoji="🐎", nouns=("horse", "brown horse"), going="running"),
        Thing(emoji="🐘", nouns=("elephant", "gray elephant"), going="walking"),
        Thing(emoji="🐢", nouns=("turtle", "green turtle"), going="walking"),
        Thing(emoji="🐇", nouns=("rabbit", "bunny"), going="running"),
        Thing(emoji="🐧", nouns=("penguin",), going="walking"),
        Thing(emoji="🦋", nouns=("butterfly", "orange butterfly"), going="flying"),
        Thing(emoji="🐠", nouns=("fish", "striped fish"), going="swimming"),
        Thing(emoji="🐙", nouns=("octopus",), going="swimming"),
        Thing(emoji="🚗", nouns=("car", "red car"), going="driving"),
        Thing(emoji="🚌", nouns=("bus", "big bus"), going="driving"),
        Thing(emoji="🚲", nouns=("bicycle", "bike"), going="riding"),
        Thing(emoji="🛩", nouns=("airplane", "plane"), going="flying"),
        Thing(emoji="🚀", nouns=("rocket", "space rocket"), going="flying"),
        Thing(emoji="⛵", nouns=("sailboat", "boat"), going="sailing"),
        Thing(emoji="🚂", nouns=("train", "steam train"), going="driving"),
        Thing(emoji="🎈", nouns=("balloon", "red balloon"), going="flying"),
        Thing(emoji="⚽", nouns=("ball", "soccer ball"), going="rolling"),
        Thing(emoji="🎸", nouns=("guitar", "electric guitar"), going="sliding"),
        Thing(emoji="🌻", nouns=("sunflower", "yellow flower"), going="sliding"),
        Thing(emoji="☂", nouns=("umbrella", "purple umbrella"), going="flying"),
        Thing(emoji="🎃", nouns=("pumpkin", "orange pumpkin"), going="rolling"),
        Thing(emoji="🧸", nouns=("teddy bear", "brown teddy bear"), going="sliding"),
    )
}


def _standing(_progress: float, course: Course) -> Pose:
    return Pose(x=course.x, y=course.y, scale=course.scale)


def _crossing(progress: float, course: Course) -> Pose:
    x = -0.15 + 1.3 * progress
    return Pose(x=x if course.direction > 0 else 1 - x, y=course.y, scale=course.scale)


def _rising(progress: float, course: Course) -> Pose:
    return Pose(x=course.x, y=1.15 - 1.3 * progress, scale=course.scale)


def _spinning(progress: float, course: Course) -> Pose:
    turns = max(1.0, course.cycles / 2) * course.direction
    return Pose(x=course.x, y=course.y, scale=course.scale, turn_deg=360 * (course.phase + turns * progress))


def _growing(progress: float, course: Course) -> Pose:
    return Pose(x=0.5, y=0.55, scale=0.15 + (0.75 + 0.3 * course.phase) * progress)


def _bouncing(progress: float, course: Course) -> Pose:
    hop = abs(math.sin(math.pi * (course.phase + course.cycles * progress)))
    return Pose(x=course.x, y=0.78 - 0.5 * hop, scale=0.85 * course.scale)


# "{going}" becomes the thing's own way of crossing the frame.
MOTIONS = {
    "standing": Motion(phrases=("is standing still", "stands still", "is not moving"), pose=_standing),
    "crossing": Motion(phrases=("is {going} past", "is {going} by", "crosses the picture"), pose=_crossing),
    "rising": Motion(phrases=("is rising", "rises", "is going up", "is floating up"), pose=_rising),
    "spinning": Motion(phrases=("is spinning", "spins around", "is turning around and around"), pose=_spinning),
    "growing": Motion(phrases=("is growing", "is getting bigger", "gets bigger and bigger"), pose=_growing),
    "bouncing": Motion(phrases=("is bouncing", "bounces up and down", "is jumping up and down"), pose=_bouncing),
}


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

FRAME_SIZES_PX = ((320, 240), (320, 180), (256, 256), (240, 320), (426, 240), (200, 150))
FRAME_RATES = (8, 10, 12, 15, 24, 25, 30)


def combinations_by_split(seed: int = 0) -> dict[Split, list[Combination]]:
    """Every thing x motion x scene in exactly one split: 5 % validation, 12 % test, the rest for training."""
    every = [Combination(*names) for names in product(THINGS, MOTIONS, SCENES)]
    shuffled = [every[i] for i in np.random.default_rng(seed).permutation(len(every))]
    test, validation = round(0.12 * len(every)), round(0.05 * len(every))
    return {
        "test": shuffled[:test],
        "validation": shuffled[test : test + validation],
        "train": shuffled[test + validation :],
    }


def clips(*, train_per_combination: int = 4, held_out_per_combination: int = 3, seed: int = 0) -> Iterator[DemoClip]:
    """All clips of the demo world, in a fixed order."""
    for split, combinations in combinations_by_split(seed).items():
        count = train_per_combination if split == "train" else held_out_per_combination
        for number, (combination, take) in enumerate(product(combinations, range(count))):
            name = f"{split}_{number:04d}_{combination.thing}_{combination.motion}_{combination.scene}_{take}"
            yield DemoClip(name.replace(" ", "-"), split, combination, seed * 1_000_000 + number * 10 + take)


def _random(clip: DemoClip, purpose: str) -> np.random.Generator:
    return np.random.default_rng([clip.seed, *clip.split.encode(), *purpose.encode()])


def references(clip: DemoClip) -> list[str]:
    """Several different sentences a person might say about the clip."""
    combination, rng = clip.combination, _random(clip, "references")
    thing = THINGS[combination.thing]
    sentences = [
        f"{article} {noun} {phrase.format(going=thing.going)} {place}"
        for noun, phrase, place in product(
            thing.nouns, MOTIONS[combination.motion].phrases, SCENES[combination.scene].phrases
        )
        for article in ("an" if noun[0] in "aeiou" else "a",)
    ]
    return [sentences[i] for i in rng.permutation(len(sentences))[:REFERENCES_PER_CLIP]]


def named(caption: str) -> Combination:
    """What a caption names; an attribute that it does not name, or names twice differently, is an empty string."""
    text = " ".join(words(caption))

    def said(phrases: tuple[str, ...]) -> bool:
        return any(
            re.search(rf"\b{re.escape(phrase).replace(re.escape('{going}'), r'[a-z]+')}\b", text) for phrase in phrases
        )

    def only(candidates: dict[str, tuple[str, ...]]) -> str:
        found = [name for name, phrases in candidates.items() if said(phrases)]
        return found[0] if len(found) == 1 else ""

    return Combination(
        thing=only({name: thing.nouns for name, thing in THINGS.items()}),
        motion=only({name: motion.phrases for name, motion in MOTIONS.items()}),
        scene=only({name: scene.phrases for name, scene in SCENES.items()}),
    )


@cache
def _glyph(thing: str) -> Image.Image:
    column = list(THINGS).index(thing)
    with Image.open(THINGS_ATLAS) as atlas:
        return atlas.convert("RGBA").crop((column * GLYPH_PX, 0, (column + 1) * GLYPH_PX, GLYPH_PX))


def frames(clip: DemoClip, *, count: int, size_px: tuple[int, int]) -> Iterator[np.ndarray]:
    """`count` RGB frames (height, width, 3) uint8, equally spaced over the clip, without compression."""
    rng, (width, height) = _random(clip, "frames"), size_px
    background = Image.new("RGB", size_px)
    SCENES[clip.combination.scene].paint(ImageDraw.Draw(background), rng, width, height)
    pose_at, sprite = MOTIONS[clip.combination.motion].pose, _glyph(clip.combination.thing)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    course = Course(
        x=rng.uniform(0.3, 0.7),
        y=rng.uniform(0.45, 0.68),
        scale=rng.uniform(0.34, 0.58),
        cycles=rng.uniform(2, 4),
        phase=rng.uniform(0, 1),
        direction=int(rng.choice([-1, 1])),
    )
    brightness, noise_level = rng.uniform(0.85, 1.1), rng.uniform(0, 9)
    grain = rng.normal(0, noise_level, (2 * height, width, 3)).astype(np.float32)
    for moment in range(count):
        pose = pose_at(moment / max(1, count - 1), course)
        side = max(4, round(pose.scale * min(width, height)))
        thing = sprite.resize((side, side), Image.Resampling.BILINEAR)
        if pose.turn_deg:
            thing = thing.rotate(pose.turn_deg, Image.Resampling.BILINEAR, expand=True)
        picture = background.copy()
        picture.paste(
            thing, (round(pose.x * width - thing.width / 2), round(pose.y * height - thing.height / 2)), thing
        )
        start = int(rng.integers(0, height))
        pixels = np.asarray(picture, np.float32) * brightness + grain[start : start + height]
        yield np.clip(pixels, 0, 255).astype(np.uint8)


def render(clip: DemoClip) -> bytes:
    """The clip as an H.264 .mp4. The pictures are a function of the clip; x264's bytes differ a little each time."""
    rng = _random(clip, "file")
    size_px, frame_rate = FRAME_SIZES_PX[rng.integers(len(FRAME_SIZES_PX))], int(rng.choice(FRAME_RATES))
    count = max(16, round(frame_rate * rng.uniform(1.5, 3.0)))
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        options = {"crf": str(rng.integers(20, 35)), "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=frame_rate, options=options)
        stream.width, stream.height = size_px
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.time_base = Fraction(1, frame_rate)
        for pixels in frames(clip, count=count, size_px=size_px):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def draw_things_atlas(font_path: Path) -> Image.Image:
    """All things in one row, drawn with a bitmap colour-emoji font such as Noto Color Emoji (SIL OFL 1.1)."""
    from PIL import ImageFont

    font = ImageFont.truetype(str(font_path), 109)
    atlas = Image.new("RGBA", (GLYPH_PX * len(THINGS), GLYPH_PX))
    for column, thing in enumerate(THINGS.values()):
        glyph = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(glyph).text((8, 8), thing.emoji, font=font, embedded_color=True)
        box = glyph.getbbox()
        if box is None:
            raise ValueError(f"{font_path} has no glyph for {thing.emoji!r} ({thing.nouns[0]})")
        glyph = glyph.crop(box)
        glyph.thumbnail((GLYPH_PX, GLYPH_PX), Image.Resampling.LANCZOS)
        atlas.paste(glyph, (column * GLYPH_PX + (GLYPH_PX - glyph.width) // 2, (GLYPH_PX - glyph.height) // 2))
    return atlas
