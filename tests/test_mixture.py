"""Stills are stored once and stand for 16 frames, and several data sets are one, each with its weight."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from etenet.errors import UsageError
from etenet.video.sampling import middle_of_slices
from tests.test_recipes import stage
from training.data.datasets import Dataset, DatasetClip
from training.data.mixture import data_source, load_all
from training.loop.order import TrainingExample, epoch_windows, examples_per_epoch

WORDS = ["a", "dog"]


def dataset_folder(
    folder: Path, clips: Sequence[dict[str, object]], frames: NDArray[np.uint8], words: list[str]
) -> Path:
    folder.mkdir()
    lines = [{"captions": ["a dog", "dog"], "file": None, **clip} for clip in clips]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "vocabulary.json").write_text(json.dumps({"words": words}))
    np.save(folder / "frames.npy", frames)
    return folder


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(len(shape)).integers(256, size=(*shape, 4, 4, 3), dtype=np.uint8)


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """Four clips of video to train on and one of each other split, 16 frames each."""
    splits = ["train"] * 4 + ["validation", "test"]
    clips = [{"video": f"film{row}", "row": row, "split": split} for row, split in enumerate(splits)]
    return dataset_folder(tmp_path / "films", clips, noise(6, 16), WORDS)


@pytest.fixture
def stills(tmp_path: Path) -> Path:
    """Clips of 1, 2 and 5 stills to train on, and a photograph of another split."""
    sizes, splits, rows = (1, 2, 5, 1), ("train",) * 3 + ("validation",), (0, 1, 3, 8)
    clips = [
        {"video": f"still{row}", "row": row, "distinct": size, "split": split}
        for row, size, split in zip(rows, sizes, splits, strict=True)
    ]
    return dataset_folder(tmp_path / "stills", clips, noise(9), ["a", "cat"])


def test_stills_are_filled_up_to_16_frames_by_the_rule_for_short_clips(stills: Path) -> None:
    dataset, pictures = Dataset.load(stills), np.load(stills / "frames.npy")
    assert (dataset.frame_count, dataset.resize_px) == (9, 4)
    clips = dataset.clips["train"]
    for clip, frames in zip(clips, dataset.frames_of(clips).numpy(), strict=True):
        own = pictures[clip.row : clip.row + (clip.distinct or 0)]
        np.testing.assert_array_equal(frames, own[middle_of_slices(len(own))])
        np.testing.assert_array_equal(dataset.pixels(dataset.distinct_rows(clip)).numpy(), own)
        assert (
            np.repeat(dataset.distinct_rows(clip), dataset.repeats(clip)).tolist() == dataset.frame_rows(clip).tolist()
        )
    five = clips[2]
    np.testing.assert_array_equal(dataset.frames_of([five], [[4, 0]])[0].numpy(), pictures[[7, 3]])
    assert dataset.repeats(five).sum() == 16


def test_the_rows_of_a_clip_of_video_are_its_16_frames(films: Path) -> None:
    dataset, frames = Dataset.load(films), np.load(films / "frames.npy")
    assert dataset.frame_count == 96
    (clip,) = dataset.clips["test"]
    assert dataset.frame_rows(clip).tolist() == dataset.distinct_rows(clip).tolist() == list(range(80, 96))
    np.testing.assert_array_equal(dataset.frames_of([clip], [[3, 15]])[0].numpy(), frames[5, [3, 15]])
    np.testing.assert_array_equal(dataset.stills_of([clip], [7])[0].numpy(), frames[5, 7])


def test_the_digest_sees_every_still(stills: Path) -> None:
    first, frames = Dataset.load(stills).digest(), np.load(stills / "frames.npy")
    for row in range(len(frames)):
        changed = frames.copy()
        changed[row] = 255 - changed[row]
        np.save(stills / "frames.npy", changed)
        assert Dataset.load(stills).digest() != first


def test_a_mixture_has_the_training_clips_of_all_and_the_validation_of_the_first(films: Path, stills: Path) -> None:
    alone, one, other = load_all([(films, 1.0)]), Dataset.load(films), Dataset.load(stills)
    assert (type(alone), alone.digest()) == (Dataset, one.digest())
    mixture = load_all([(films, 1.0), (stills, 0.5)])
    assert [clip.video for clip in mixture.need("validation")] == ["film4"]
    assert [clip.video for clip in mixture.clips["train"]] == [
        *(f"film{n}" for n in range(4)),
        "still0",
        "still1",
        "still3",
    ]
    assert mixture.vocabulary().known_words == ("a", "dog", "cat")
    assert mixture.frame_count == 96 + 9
    for clip, own in zip(mixture.clips["train"], [*one.clips["train"], *other.clips["train"]], strict=True):
        of = (one, other)[clip.part]
        np.testing.assert_array_equal(mixture.frames_of([clip]).numpy(), of.frames_of([own]).numpy())
        np.testing.assert_array_equal(mixture.pixels(mixture.frame_rows(clip)).numpy(), of.frames_of([own])[0].numpy())
    rows = np.concatenate([mixture.distinct_rows(clip) for clip in mixture.clips["train"]])
    assert len(set(rows)) == 64 + 8, "no two clips share a row"
    digests = {load_all([(films, a), (stills, b)]).digest() for a, b in ((1.0, 0.5), (1.0, 0.4), (2.0, 0.5))}
    assert len(digests | {one.digest(), other.digest(), load_all([(stills, 0.5), (films, 1.0)]).digest()}) == 6


def test_folders_that_do_not_fit_together_are_named(films: Path, stills: Path, tmp_path: Path) -> None:
    large = dataset_folder(tmp_path / "large", [], np.zeros((1, 8, 8, 3), np.uint8), WORDS)
    with pytest.raises(UsageError, match=r"films has frames of 4 pixels and .*large of 8; prepare both with the same"):
        load_all([(films, 1.0), (large, 1.0)])
    with pytest.raises(UsageError, match="films or another folder is given twice"):
        load_all([(films, 1.0), (films, 1.0)])
    (stills / "frames.npy").rename(stills / "features.npy")
    with pytest.raises(UsageError, match="stills holds given features; train on it alone"):
        load_all([(films, 1.0), (stills, 1.0)])
    with pytest.raises(UsageError, match=r"large has no validation split, only no clips at all; prepare it again"):
        Dataset.load(large).need("validation")
    with pytest.raises(UsageError, match=r"large has frames of 8 pixels, the encoder takes 9; prepare it again"):
        Dataset.load(large).need_size(9)
    Dataset.load(large).need_size(8)


def test_a_data_set_is_named_with_its_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert data_source("data/own") == (Path("data/own"), 1.0)
    assert data_source("data/own=0.25") == (Path("data/own"), 0.25)
    assert data_source("data/size=large") == (Path("data/size=large"), 1.0)
    (tmp_path / "size=4").mkdir()
    assert data_source("size=4") == (Path("size=4"), 1.0)
    for weight in ("0", "-1", "nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="the weight of own must be above 0"):
            data_source(f"own={weight}")


def weighted(part: int, weight: float, clips: int = 20) -> list[DatasetClip]:
    captions = tuple(f"{number}" for number in range(3))
    return [DatasetClip(n, f"{part}/{n}", captions, part=part, weight=weight, distinct=5) for n in range(clips)]


def epoch(clips: Sequence[DatasetClip], number: int = 0, **fields: object) -> list[TrainingExample]:
    of = stage(epoch_of="clips", **fields)
    windows = list(epoch_windows(clips, of, seed=1, stage_number=1, epoch=number, frames_per_clip=2))
    assert sum(map(len, windows)) == examples_per_epoch(clips, of)
    return [example for window in windows for example in window]


def test_a_weight_says_how_often_an_epoch_has_a_clip() -> None:
    clips = [*weighted(0, 1.0), *weighted(1, 0.5), *weighted(2, 2.25), *weighted(3, 0.01)]
    seen = Counter(example.clip.video for example in epoch(clips))
    by_part = [[seen[clip.video] for clip in clips if clip.part == part] for part in range(4)]
    assert by_part[0] == [1] * 20
    assert Counter(by_part[1]) == {0: 10, 1: 10}
    assert Counter(by_part[2]) == {2: 15, 3: 5}
    assert sum(by_part[3]) == 1
    again = Counter(example.clip.video for example in epoch(clips, 1))
    assert {clip.video for clip in clips if seen[clip.video] != again[clip.video]}, "each epoch draws anew"
    assert epoch(clips) == epoch(clips), "an epoch is a function of its number"
    assert examples_per_epoch(clips, stage(epoch_of="captions", captions_per_clip=2)) == 40 + 20 + 90 + 1


def test_an_example_looks_at_different_frames_of_its_clip_drawn_anew() -> None:
    clips = weighted(0, 1.0, clips=50)
    drawn = {example.clip.video: example.moments for example in epoch(clips)}
    assert all(moments and 0 <= moments[0] < 2 <= moments[1] < 5 for moments in drawn.values())
    assert {moments[1] for moments in drawn.values() if moments} == {2, 3, 4}
    assert drawn != {example.clip.video: example.moments for example in epoch(clips, 1)}
    photograph = [DatasetClip(0, "a", ("b",), distinct=1)]
    assert [example.moments for example in epoch(photograph)] == [(0, 0)]
    film = [DatasetClip(0, "a", ("b",))]
    (example,) = epoch(film)
    assert example.moments is not None
    assert example.moments[0] < 8 <= example.moments[1] < 16
