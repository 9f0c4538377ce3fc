"""A run is a recipe: a Python function that returns every number of it, typed and complete."""

from __future__ import annotations

from dataclasses import dataclass, field

from etenet.config import Preprocessing
from etenet.encoder import default_preprocessing
from training.loss import ATTENTION_PENALTY


@dataclass(frozen=True, kw_only=True, slots=True)
class Stills:
    """Teaching the encoder to name what is in single frames, before captions."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    report_every: int = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of caption training. `encoder_learning_rate` 0 freezes the encoder and caches its features."""

    epochs: int
    batch_clips: int
    accumulation_steps: int
    captions_per_clip: int
    encoder_learning_rate: float
    encoder_weight_decay: float
    decoder_learning_rate: float
    decoder_weight_decay: float
    warmup_steps: int = 0  # the rates rise to their values along a line
    final_learning_rate_share: float = 1.0  # and fall to this share along a half cosine
    gradient_clip_value: float = 10.0
    attention_penalty: float = ATTENTION_PENALTY


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    encoder: str
    crop_px: int
    max_words: int
    dropout: float
    stills: Stills
    stages: dict[int, Stage] = field(default_factory=dict)
    seed: int = 0

    def preprocessing(self) -> Preprocessing:
        return default_preprocessing(self.encoder, crop_px=self.crop_px)


def demo() -> Recipe:
    """A small encoder on the rendered demo world; about an hour and a half on two CPU cores."""
    return Recipe(
        encoder="squeezenet1_1",
        crop_px=112,
        max_words=20,
        dropout=0.3,
        stills=Stills(steps=1400, batch=256, learning_rate=8e-4, weight_decay=1e-4),
        stages={
            1: Stage(
                epochs=12,
                batch_clips=32,
                accumulation_steps=1,
                captions_per_clip=4,
                encoder_learning_rate=0.0,
                encoder_weight_decay=0.0,
                decoder_learning_rate=1e-3,
                decoder_weight_decay=1e-4,
                final_learning_rate_share=0.1,
            ),
            2: Stage(
                epochs=18,
                batch_clips=16,
                accumulation_steps=1,
                captions_per_clip=2,
                encoder_learning_rate=4e-4,
                encoder_weight_decay=4e-5,
                decoder_learning_rate=4e-4,
                decoder_weight_decay=1e-4,
                warmup_steps=100,
                final_learning_rate_share=0.02,
            ),
        },
    )


RECIPES = {"demo": demo}
