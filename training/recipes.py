"""A run is a recipe: a Python function that returns all its numbers, typed and complete."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from etenet.errors import UsageError
from etenet.model.config import Preprocessing
from etenet.model.encoder import default_preprocessing
from etenet.scoring.scores import TOKENIZERS, Tokenizer
from training.loop.loss import ATTENTION_PENALTY


@dataclass(frozen=True, kw_only=True, slots=True)
class Stills:
    """How the encoder learns to name what is in single frames, before captions."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    report_every: int = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of caption training. `encoder_learning_rate` 0 freezes the encoder and caches its features.

    An optimizer step sees `batch_clips * accumulation_steps` clips with `captions_per_clip` sentences each: the
    effective batch, in sentences, is the product of the three. With `epoch_of="captions"` an epoch has every sentence
    of the data set once (as in the paper), with `"clips"` every clip once.
    """

    epochs: int
    patience_epochs: int
    epoch_of: Literal["captions", "clips"] = "captions"
    batch_clips: int
    accumulation_steps: int
    captions_per_clip: int = 1
    mirrored_share: float = 0.0  # of the examples, whose frames are mirrored
    encoder_learning_rate: float
    encoder_weight_decay: float = 4e-5
    decoder_learning_rate: float
    decoder_weight_decay: float = 1e-4
    warmup_steps: int = 0  # the learning rates rise linearly during these steps
    final_learning_rate_share: float = 1.0  # and then fall to this share along a half cosine
    gradient_clip_value: float = 10.0
    attention_penalty: float = ATTENTION_PENALTY
    mixed_precision: bool = True  # the encoder in bf16 autocast
    tokenizer: Tokenizer = "ptb"  # of the validation scores; "none": captions are normalised, no Java
    meteor: bool = True  # a validation score; its Java program takes about 8 s of a core per epoch
    activation_checkpointing: bool = False  # recompute the encoder's activations instead of storing them
    compiled: bool = False  # the encoder by torch.compile, if that works; takes minutes before the first step

    def __post_init__(self) -> None:
        if self.tokenizer not in TOKENIZERS:
            raise UsageError(f"tokenizer is one of {', '.join(TOKENIZERS)}, got {self.tokenizer!r}")
        if self.mirrored_share and not self.encoder_learning_rate:
            raise UsageError(
                "mirrored_share needs encoder_learning_rate: a frozen encoder runs over every clip once, unmirrored"
            )

    @property
    def window_clips(self) -> int:
        """Clips (with their sentences) per optimizer step."""
        return self.batch_clips * self.accumulation_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    encoder: str
    crop_px: int
    max_words: int
    dropout: float
    stages: dict[int, Stage]
    stills: Stills | None = None
    seed: int = 0

    def preprocessing(self) -> Preprocessing:
        return default_preprocessing(self.encoder, crop_px=self.crop_px)


def paper(*, max_words: int) -> Recipe:
    """arXiv 1904.02628, section 3.3, to the letter. The paper does not say how long to train.

    Under Adam a rate of 1e-9 moves a weight by about 1e-6 in a thousand steps, so stage 2 hardly changes the encoder.
    Try `--set encoder_learning_rate=1e-5`.
    """
    first = Stage(
        epochs=100,
        patience_epochs=10,
        batch_clips=512,
        accumulation_steps=1,
        encoder_learning_rate=0.0,
        decoder_learning_rate=1e-4,
    )
    second = replace(
        first, epochs=20, patience_epochs=5, batch_clips=8, accumulation_steps=64, encoder_learning_rate=1e-9
    )
    return Recipe(
        encoder="inceptionresnetv2", crop_px=299, max_words=max_words, dropout=0.0, stages={1: first, 2: second}
    )


def msvd() -> Recipe:
    """The paper's MSVD run."""
    return paper(max_words=30)


def msrvtt() -> Recipe:
    """The paper's MSR-VTT run."""
    return paper(max_words=20)


def demo() -> Recipe:
    """A small encoder on the rendered demo world. Trains in about an hour and a half on two CPU cores."""
    return Recipe(
        encoder="squeezenet1_1",
        crop_px=112,
        max_words=20,
        dropout=0.3,
        stills=Stills(steps=1400, batch=256, learning_rate=8e-4, weight_decay=1e-4),
        stages={
            1: Stage(
                epochs=10,
                patience_epochs=10,
                epoch_of="clips",
                batch_clips=32,
                accumulation_steps=1,
                captions_per_clip=4,
                encoder_learning_rate=0.0,
                decoder_learning_rate=1e-3,
                final_learning_rate_share=0.1,
            ),
            2: Stage(
                epochs=12,
                patience_epochs=12,
                epoch_of="clips",
                batch_clips=16,
                accumulation_steps=1,
                captions_per_clip=2,
                mirrored_share=0.5,
                encoder_learning_rate=4e-4,
                decoder_learning_rate=4e-4,
                warmup_steps=100,
                final_learning_rate_share=0.02,
            ),
        },
    )


def demo_full() -> Recipe:
    """The paper's network on the demo world, from random weights: about five minutes of one H100 and 16 cores.

    A clip costs the encoder 0.42 TFLOP forward (16 frames of 299 x 299) and 1.27 TFLOP forward and backward. A still
    costs a sixteenth of that. With three clips per combination (`--train-per-combination 3`: 2,151 for training, 2,592
    in all):

        rendering       2,592 clips x 0.1 s of a core                    16 s on 16 cores
        stills          1,200 steps x 128 stills x 0.079 TFLOP           12 PFLOP
        stage 1         features of 2,280 clips x 0.42 TFLOP              1 PFLOP, and 544 steps of the decoder
        stage 2         2 epochs of 6,453 examples x 1.27 TFLOP          16 PFLOP

    29 PFLOP take 105 s at 35 % of 790 TFLOP/s, and 185 s at 20 %. To this come four starts of Python, validation, and
    snapshots of 0.8 GB. Nothing here needs Java.
    """
    first = Stage(
        epochs=8,
        patience_epochs=8,
        epoch_of="clips",
        batch_clips=32,
        accumulation_steps=1,
        captions_per_clip=6,
        encoder_learning_rate=0.0,
        decoder_learning_rate=1e-3,
        final_learning_rate_share=0.1,
        tokenizer="none",
        meteor=False,
    )
    second = replace(
        first,
        epochs=2,
        patience_epochs=2,
        epoch_of="captions",
        batch_clips=16,
        captions_per_clip=2,
        mirrored_share=0.5,
        encoder_learning_rate=1e-4,  # frozen BatchNorm does not correct what larger steps do
        decoder_learning_rate=4e-4,
        warmup_steps=50,
        final_learning_rate_share=0.02,
    )
    return Recipe(
        encoder="inceptionresnetv2",
        crop_px=299,
        max_words=20,
        dropout=0.3,
        stills=Stills(steps=1200, batch=128, learning_rate=1e-3, weight_decay=1e-4, report_every=600),
        stages={1: first, 2: second},
    )


RECIPES = {"msvd": msvd, "msrvtt": msrvtt, "demo": demo, "demo-full": demo_full}

Part = Literal[1, 2, "stills"]


def overridden(recipe: Recipe, part: Part, settings: Sequence[str]) -> Recipe:
    """The recipe with `field=value` settings applied to the part or the recipe itself. Raises `UsageError`."""
    for setting in settings:
        name, _, text = setting.partition("=")
        of_part = recipe.stills if part == "stills" else recipe.stages[part]
        owner = of_part if of_part and name in _settable(of_part) else recipe
        if name not in _settable(owner):
            choice = ", ".join([*(_settable(of_part) if of_part else ()), *_settable(recipe)])
            raise UsageError(f"--set {setting}: no field {name!r}; choose one of {choice}")
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            value = text
        wanted = type(getattr(owner, name))
        if wanted is float and isinstance(value, int):
            value = float(value)
        if type(value) is not wanted:
            raise UsageError(f"--set {setting}: {name} is a {wanted.__name__}, such as {getattr(owner, name)!r}")
        if isinstance(owner, Stills):
            recipe = replace(recipe, stills=replace(owner, **{name: value}))
        elif isinstance(owner, Stage) and part != "stills":
            recipe = replace(recipe, stages={**recipe.stages, part: replace(owner, **{name: value})})
        else:
            recipe = replace(recipe, **{name: value})
    return recipe


def _settable(owner: Stage | Stills | Recipe) -> list[str]:
    return [field.name for field in fields(owner) if isinstance(getattr(owner, field.name), bool | int | float | str)]
