"""Recipes are the paper's, and `--set` changes one number of them."""

from __future__ import annotations

import numpy as np
import pytest

from etenet.errors import UsageError
from training.data.datasets import DatasetClip
from training.demo import world
from training.loop.order import epoch_windows, examples_per_epoch
from training.loop.views import WHOLE, View, numbered_view
from training.recipes import RECIPES, overridden
from training.run_settings import Stage


@pytest.mark.parametrize(("name", "max_words"), [("msvd", 30), ("msrvtt", 20)])
def test_the_papers_recipes_are_the_papers(name: str, max_words: int) -> None:
    recipe = RECIPES[name]()
    assert (recipe.encoder, recipe.crop_px, recipe.max_words) == ("inceptionresnetv2", 299, max_words)
    assert recipe.preprocessing().resize_px == 314
    first, second = recipe.stages[1], recipe.stages[2]
    assert first.encoder_learning_rate == 0
    assert (second.encoder_learning_rate, second.encoder_weight_decay) == (1e-9, 4e-5)
    for stage in (first, second):
        assert stage.window_clips * stage.captions_per_clip == 512
        assert (stage.decoder_learning_rate, stage.decoder_weight_decay) == (1e-4, 1e-4)
        assert (stage.gradient_clip_value, stage.gradient_clip_norm, stage.attention_penalty) == (10, 0, 0.70602)
        assert not stage.mixed_precision  # the paper does not say: float32
        assert (stage.label_smoothing, stage.weight_average, stage.frames_per_clip, stage.samples_per_clip) == (0,) * 4
    assert (recipe.hidden_size, recipe.embedding_size, recipe.attention_size) == (512, 486, 512)
    assert (recipe.projection, recipe.dropout, recipe.output_bias) == (0, 0, "zero")
    assert recipe.stages.keys() == {1, 2}


def test_the_full_size_demo_takes_what_its_docstring_says() -> None:
    recipe = RECIPES["demo-full"]()
    assert (recipe.encoder, recipe.preprocessing().resize_px) == ("inceptionresnetv2", 314)
    assert all(stage.tokenizer == "none" and not stage.meteor for stage in recipe.stages.values())  # no Java
    rendered = list(world.clips(train_per_combination=3))
    clips = [
        DatasetClip(row=row, video=clip.name, captions=tuple(world.references(clip)))
        for row, clip in enumerate(rendered)
        if clip.split == "train"
    ]
    seen_once = len(clips) + sum(clip.split == "validation" for clip in rendered)
    assert (len(rendered), len(clips), seen_once) == (2592, 2151, 2280)
    steps = {n: s.epochs * -(-examples_per_epoch(clips, s) // s.window_clips) for n, s in recipe.stages.items()}
    visits = recipe.stages[2].epochs * examples_per_epoch(clips, recipe.stages[2])
    assert (steps[1], visits) == (544, 2 * 6453)
    clip_pflop = 0.422e-3
    stills = recipe.stills.steps * recipe.stills.batch * 3 * clip_pflop / 16
    work = [stills, seen_once * clip_pflop, visits * 3 * clip_pflop]
    assert [round(pflop) for pflop in work] == [12, 1, 16]
    assert sum(work) / 0.790 / 0.20 < 190  # seconds at a fifth of 790 TFLOP/s


def test_a_setting_changes_its_field_and_no_other() -> None:
    recipe = RECIPES["msvd"]()
    changed = overridden(recipe, 2, ["encoder_learning_rate=1e-5", "dropout=0.5", "epoch_of=clips"])
    assert changed.stages[2].encoder_learning_rate == 1e-5
    assert changed.stages[2].epoch_of == "clips"
    assert changed.dropout == 0.5
    assert changed.stages[1] == recipe.stages[1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("learning_rate=1", "no field 'learning_rate'; choose one of epochs, "),
        ("epochs=many", "epochs is a int, such as 12"),
        ("epochs", "epochs is a int"),
        ("mixed_precision=1", "mixed_precision is a bool"),
        ("encoder_learning_rate=0", "mirrored_share and smallest_crop need encoder_learning_rate"),
        ("tokenizer=treebank", "tokenizer is one of ptb, none, got 'treebank'"),
        ("epoch_of=steps", "epoch_of is one of captions, clips, got 'steps'"),
        ("baseline=none", "baseline is one of greedy, mean of the other samples, got 'none'"),
        ("output_bias=1", "output_bias is a str, such as 'zero'"),
        ("output_bias=one", "output_bias is one of zero, word frequency, got 'one'"),
        ("batch_clips=0", "batch_clips must be at least 1, got 0"),
        ("epochs=-1", "epochs must be at least 1, got -1"),
        ("max_words=0", "max_words must be at least 1, got 0"),
        ("dropout=-1", "dropout must be from 0 to 1, 1 excluded, got -1.0"),
        ("dropout=1", "dropout must be from 0 to 1, 1 excluded, got 1.0"),
        ("label_smoothing=1.5", "label_smoothing must be from 0 to 1, 1 excluded, got 1.5"),
        ("decoder_learning_rate=-1", "decoder_learning_rate must be at least 0, got -1.0"),
        ("decoder_learning_rate=1e999", "decoder_learning_rate must be at least 0, got inf"),
        ("frames_per_clip=17", "frames_per_clip is at most 16, got 17"),
        ("samples_per_clip=5", "samples_per_clip is for a frozen encoder: set encoder_learning_rate to 0"),
        ("teacher_forcing=1", "teacher_forcing is for stages with samples_per_clip"),
        ("views=2", "views are for a frozen encoder"),
        ("smallest_crop=1.5", "smallest_crop must be from 0 to 1, got 1.5"),
    ],
)
def test_a_wrong_setting_is_named_with_its_fix(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        overridden(RECIPES["demo"](), 2, [setting])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("samples_per_clip=1", "the mean of the other samples needs samples_per_clip of 2 or more"),
        ("captions_per_clip=5", "captions_per_clip and label_smoothing are not for samples"),
        ("label_smoothing=0.1", "captions_per_clip and label_smoothing are not for samples"),
        ("caption_agreement=1", "caption_agreement needs teacher_forcing"),
        ("teacher_forcing=-1", "teacher_forcing must be at least 0"),
    ],
)
def test_self_critical_training_takes_no_settings_of_teacher_forcing(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        overridden(RECIPES["real"](), 3, ["teacher_forcing=0", setting])


def test_settings_are_checked_together_and_not_one_by_one() -> None:
    changed = overridden(RECIPES["real"](), 3, ["samples_per_clip=1", "baseline=greedy"])
    assert (changed.stages[3].samples_per_clip, changed.stages[3].baseline) == (1, "greedy")


def test_captions_are_not_both_drawn_and_all_had() -> None:
    with pytest.raises(UsageError, match=r"caption_agreement draws captions, .* set epoch_of to clips"):
        overridden(RECIPES["msvd"](), 1, ["caption_agreement=1"])


def test_a_stage_that_a_recipe_lacks_is_named() -> None:
    with pytest.raises(UsageError, match="the recipe has no stage 3; choose one of 1, 2"):
        overridden(RECIPES["msvd"](), 3, [])


CLIPS = [DatasetClip(row=n, video=f"v{n}", captions=tuple(f"{n} {i}" for i in range(1 + n % 4))) for n in range(10)]


def stage(**fields: object) -> Stage:
    return Stage(
        **{
            "epochs": 1,
            "patience_epochs": 1,
            "batch_clips": 3,
            "accumulation_steps": 2,
            "encoder_learning_rate": 0.0,
            "decoder_learning_rate": 1e-3,
            **fields,
        }  # type: ignore[arg-type]
    )


def epoch(of: Stage, number: int) -> list[tuple[str, tuple[str, ...]]]:
    windows = list(epoch_windows(CLIPS, of, seed=1, stage_number=1, epoch=number))
    assert all(len(window) == of.window_clips for window in windows[:-1])
    return [(example.clip.video, example.captions) for window in windows for example in window]


def test_an_epoch_of_captions_has_every_sentence_once() -> None:
    captions = [caption for _, captions in epoch(stage(), 0) for caption in captions]
    assert sorted(captions) == sorted(caption for clip in CLIPS for caption in clip.captions)


def test_an_epoch_of_clips_visits_every_clip_once_with_as_many_different_sentences_as_there_are() -> None:
    visited = epoch(stage(epoch_of="clips", captions_per_clip=3), 0)
    assert sorted(video for video, _ in visited) == sorted(clip.video for clip in CLIPS)
    for video, captions in visited:
        assert len(captions) == 3
        assert len(set(captions)) == min(3, len(CLIPS[int(video[1:])].captions))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    assert epoch(stage(), 0) == epoch(stage(), 0)
    assert sorted(epoch(stage(), 0)) == sorted(epoch(stage(), 1))
    assert epoch(stage(), 0) != epoch(stage(), 1)


def test_a_share_is_mirrored_and_the_order_stays() -> None:
    plain, half = (stage(epoch_of="clips", mirrored_share=share, encoder_learning_rate=1.0) for share in (0.0, 0.5))
    assert epoch(half, 0) == epoch(plain, 0)
    many = CLIPS * 100
    mirrored = [
        example.view.mirrored
        for window in epoch_windows(many, half, seed=1, stage_number=1, epoch=0)
        for example in window
    ]
    assert 0.45 < sum(mirrored) / len(many) < 0.55


def test_crops_lie_within_the_frames_and_are_no_smaller_than_asked() -> None:
    settings = stage(smallest_crop=0.6, encoder_learning_rate=1.0)
    windows = epoch_windows(CLIPS * 100, settings, seed=1, stage_number=1, epoch=0)
    crops = np.array([example.view.crop for window in windows for example in window])
    corner, sides = crops[:, :2], crops[:, 2:]
    assert corner.min() >= 0
    assert (corner + sides).max() <= 1
    assert 0.6 <= sides.min() < 0.62
    assert 0.98 < sides.max() <= 1
    assert np.abs(np.corrcoef(sides.T)[0, 1]) < 0.1


def test_a_frozen_encoder_shows_every_numbered_view_alike_often() -> None:
    windows = epoch_windows(CLIPS * 100, stage(views=3, smallest_crop=0.6), seed=1, stage_number=1, epoch=0)
    examples = [example for window in windows for example in window]
    assert {example.view for example in examples} == {WHOLE}
    counts = np.bincount([example.view_number for example in examples], minlength=3)
    assert np.abs(counts / len(examples) - 1 / 3).max() < 0.05


def test_a_numbered_view_is_always_the_same_and_number_0_is_the_whole() -> None:
    clip, other = CLIPS[:2]
    views = [numbered_view(clip, number, smallest_crop=0.6) for number in range(4)]
    assert views == [numbered_view(clip, number, smallest_crop=0.6) for number in range(4)]
    assert views[0] == WHOLE
    assert [view.mirrored for view in views] == [False, True, False, True]
    assert len(set(views)) == 4
    assert numbered_view(other, 1, smallest_crop=0.6) != views[1]
    assert numbered_view(clip, 1, smallest_crop=1.0) == View(mirrored=True)


def test_recipes_for_a_cpu_are_in_float32() -> None:
    for name in ("own", "real"):
        assert not any(stage.mixed_precision for stage in RECIPES[name]().stages.values())


@pytest.mark.parametrize("fields", [{}, {"captions_per_clip": 2}, {"epoch_of": "clips"}])
def test_the_length_of_an_epoch_is_known_before_it(fields: dict[str, object]) -> None:
    assert len(epoch(stage(**fields), 0)) == examples_per_epoch(CLIPS, stage(**fields))
