"""The demo world: things that do simple things in simple scenes, rendered as H.264 clips with reference sentences.

A clip is a combination of one thing, one motion and one scene. Everything else about it (size, place, speed,
colours, noise, compression, frame rate, frame size) is drawn at random from a seed. Whole combinations are held
out for validation and test, so no test clip shows a combination from the training split.

To the decoder the frames are a set, so every motion here is visible in a shuffled set of frames: there is a
rise but no fall, a crossing but no left or right. The thing never leaves the picture.

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

from etenet.model.vocabulary import words
from training.demo.scenes import SCENES

Split = Literal["train", "validation", "test"]

THINGS_ATLAS = Path(__file__).with_name("things.png")
GLYPH_PX = 128
REFERENCES_PER_CLIP = 6
TRAIN_PER_COMBINATION = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """Something to draw. The first noun names the thing; `going` is how it crosses the frame."""

    emoji: str
    nouns: tuple[str, ...]
    going: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """Where the thing is at one moment. Places are fractions of the frame, `scale` of its shorter side.

    `width` is the share of its own width that it shows: less than 1 as it turns away, negative from behind.
    """

    x: float
    y: float
    scale: float
    width: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Motion:
    """`pose` takes the progress through the clip (0 to 1) and the clip's random choices."""

    phrases: tuple[str, ...]
    pose: Callable[[float, Course], Pose]


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
    """A clip that can be rendered: a function of split, combination and seed."""

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
    return Pose(x=progress if course.direction > 0 else 1 - progress, y=course.y, scale=course.scale)


def _rising(progress: float, course: Course) -> Pose:
    return Pose(x=course.x, y=1 - progress, scale=course.scale)


def _spinning(progress: float, course: Course) -> Pose:
    turn = 2 * math.pi * (course.phase + course.cycles / 2 * progress)
    return Pose(x=course.x, y=course.y, scale=course.scale, width=math.cos(turn))


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


FRAME_SIZES_PX = ((320, 240), (320, 180), (256, 256), (240, 320), (426, 240), (200, 150))
FRAME_RATES = (8, 10, 12, 15, 24, 25, 30)


def combinations_by_split() -> dict[Split, list[Combination]]:
    """Every thing x motion x scene in exactly one split: 5 % validation, 12 % test, the rest for training."""
    every = [Combination(*names) for names in product(THINGS, MOTIONS, SCENES)]
    shuffled = [every[i] for i in np.random.default_rng(0).permutation(len(every))]
    test, validation = round(0.12 * len(every)), round(0.05 * len(every))
    return {
        "test": shuffled[:test],
        "validation": shuffled[test : test + validation],
        "train": shuffled[test + validation :],
    }


def clips(
    *, train_per_combination: int = TRAIN_PER_COMBINATION, held_out_per_combination: int = 3
) -> Iterator[DemoClip]:
    """All clips of the demo world, in a fixed order."""
    for split, combinations in combinations_by_split().items():
        count = train_per_combination if split == "train" else held_out_per_combination
        for number, (combination, take) in enumerate(product(combinations, range(count))):
            name = f"{split}_{number:04d}_{combination.thing}_{combination.motion}_{combination.scene}_{take}"
            yield DemoClip(name.replace(" ", "-"), split, combination, number * 10 + take)


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
    """What a caption names. An attribute that it does not name, or for which it names two values, is empty."""
    text = " ".join(words(caption))

    def names_any(phrases: tuple[str, ...]) -> bool:
        return any(
            re.search(rf"\b{re.escape(phrase).replace(re.escape('{going}'), r'[a-z]+')}\b", text) for phrase in phrases
        )

    def only(candidates: dict[str, tuple[str, ...]]) -> str:
        matches = [name for name, phrases in candidates.items() if names_any(phrases)]
        return matches[0] if len(matches) == 1 else ""

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
        thing = sprite.resize((max(2, round(side * abs(pose.width))), side), Image.Resampling.BILINEAR)
        if pose.width < 0:
            thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture = background.copy()
        picture.paste(
            thing, (round(pose.x * width - thing.width / 2), round(pose.y * height - thing.height / 2)), thing
        )
        start = int(rng.integers(0, height))
        pixels = np.asarray(picture, np.float32) * brightness + grain[start : start + height]
        yield np.clip(pixels, 0, 255).astype(np.uint8)


def render(clip: DemoClip) -> bytes:
    """The clip as an H.264 .mp4. The pictures are a function of the clip; x264's bytes vary a little."""
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
    """All things in one row, drawn with a bitmap font of emoji. `things.png` is by Noto Color Emoji (SIL OFL 1.1)."""
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
