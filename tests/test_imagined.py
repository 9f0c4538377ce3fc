"""Clips without frames: who lends them features, how these are moved, and that a stage learns from them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from etenet.errors import UsageError
from etenet.model import checkpoint as checkpoints
from etenet.model.encoder import Encoder
from etenet.model.vocabulary import Vocabulary
from tests.test_mixture import WORDS, dataset_folder, noise
from tests.test_recipes import stage
from training import train
from training.data.dataset_folder import DatasetOptions, Entry, write
from training.data.datasets import Dataset, DatasetClip
from training.data.frame_cache import Failure
from training.data.source_clip import SourceClip
from training.data.wording import Wording
from training.loop import imagined
from training.loop.imagined import Imagination
from training.loop.loading import Loader
from training.loop.order import epoch_windows, examples_per_epoch

NAMES = [f"word{number}" for number in range(12)]
SIZE = 6


def described(rng: np.random.Generator, count: int) -> tuple[list[DatasetClip], np.ndarray]:
    """Clips of four captions each, and how often each word is in them."""
    has = rng.random((count, 1, len(NAMES))) < 0.3
    of_captions = has & (rng.random((count, 4, len(NAMES))) < 0.8)
    clips = [
        DatasetClip(
            row, f"video{row}", tuple(" ".join(np.array(NAMES)[words]) or "nothing" for words in of_clip), distinct=1
        )
        for row, of_clip in enumerate(of_captions)
    ]
    return clips, of_captions.mean(axis=1)


@pytest.fixture
def world() -> tuple[list[DatasetClip], np.ndarray, list[DatasetClip], np.ndarray]:
    """200 clips with mean features and 50 without: features are linear in the words, and a little by chance."""
    rng = np.random.default_rng(0)
    looks = rng.normal(size=(len(NAMES), SIZE))
    clips, shares = described(rng, 250)
    features = (5 + shares @ looks + rng.normal(size=(250, SIZE)) * 0.1).astype(np.float32)
    without = [replace(clip, row=-1, distinct=None) for clip in clips[200:]]
    return clips[:200], features[:200], without, features[200:]


def test_imagined_features_are_nearer_to_the_true_ones_than_those_that_were_borrowed(
    world: tuple[list[DatasetClip], np.ndarray, list[DatasetClip], np.ndarray],
) -> None:
    donors, means, without, truth = world
    imagination = Imagination(donors, means, without, Vocabulary(NAMES))
    given = imagination.clips(np.random.default_rng(0))
    assert [(clip.video, clip.captions) for clip in given] == [(clip.video, clip.captions) for clip in without]
    borrowed = means[[clip.row for clip in given]]
    moved = borrowed + np.stack([clip.shift for clip in given if clip.shift is not None])
    of_anybody = np.abs(means[:50] - truth).mean()
    assert np.abs(borrowed - truth).mean() < 0.9 * of_anybody
    assert np.abs(moved - truth).mean() < 0.3 * of_anybody
    for clip in given:
        donor = donors[clip.row]
        assert (clip.distinct, clip.part) == (donor.distinct, donor.part)


def test_donors_are_drawn_anew_for_each_epoch_among_the_nearest(
    world: tuple[list[DatasetClip], np.ndarray, list[DatasetClip], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    donors, means, without, _ = world
    imagination = Imagination(donors, means, without, Vocabulary(NAMES))

    def rows(seed: int) -> list[int]:
        return [clip.row for clip in imagination.clips(np.random.default_rng(seed))]

    assert rows(1) == rows(1) != rows(2)
    drawn = np.array([rows(seed) for seed in range(200)])
    assert {len(set(of_clip)) for of_clip in drawn.T.tolist()} == {imagined.DONORS}
    monkeypatch.setattr(imagined, "DONORS", 1)
    twin = replace(donors[7], row=-1, video="twin")
    (clip,) = Imagination(donors, means, [twin], Vocabulary(NAMES)).clips(np.random.default_rng(0))
    assert clip.shift is not None
    assert sorted(donors[clip.row].captions) == sorted(twin.captions)
    np.testing.assert_allclose(clip.shift, 0, atol=1e-6)


def test_a_shift_is_added_to_each_frame_and_what_is_never_negative_stays_so(tmp_path: Path) -> None:
    clips = [{"video": f"v{row}", "row": row, "distinct": 2, "split": "train"} for row in (0, 2)]
    dataset = Dataset.load(dataset_folder(tmp_path / "data", clips, noise(4), WORDS))
    plain, signed = np.random.default_rng(0).random((2, 4, 3)).astype(np.float32)
    signed[0, 0] = -3.0
    shift = np.array([-0.5, 0.0, 2.0], np.float32)
    first, second = dataset.clips["train"]
    for features, floor in ((plain, 0.0), (signed, -np.inf)):
        loader = Loader(dataset, Vocabulary(WORDS), 5, torch.device("cpu"), features)
        whole = loader.inputs([first, replace(first, shift=shift), second]).numpy()
        np.testing.assert_allclose(whole[1], np.maximum(whole[0] + shift, floor), rtol=1e-6)
        np.testing.assert_array_equal(whole[2], loader.inputs([second]).numpy()[0])


def test_clips_without_frames_are_in_an_epoch_as_often_as_their_weight_says() -> None:
    seen = [DatasetClip(row, f"seen{row}", ("a dog",), distinct=1) for row in range(6)]
    unseen = [
        DatasetClip(0, f"unseen{number}", ("a dog",), distinct=1, weight=0.5, shift=np.zeros(3, np.float32))
        for number in range(8)
    ]
    for weight, count in ((0.5, 4), (1.0, 8), (2.0, 16)):
        clips = seen + [replace(clip, weight=weight) for clip in unseen]
        one = stage(epoch_of="clips", batch_clips=4)
        windows = list(epoch_windows(clips, one, seed=0, stage_number=1, epoch=0))
        videos = [example.clip.video for window in windows for example in window]
        assert sum(video.startswith("unseen") for video in videos) == count
        assert len(videos) == examples_per_epoch(clips, one) == 6 + count


def source_clip(
    video: str, split: str, source: str | None = None, captions: tuple[str, ...] = ("a dog",)
) -> SourceClip:
    return SourceClip(video=video, split=split, captions=captions, source=source)


def test_a_folder_lists_clips_to_train_on_that_have_captions_alone_and_no_source_of_a_clip_to_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(dataset_folder(tmp_path / "made", [], noise(2), WORDS), out := tmp_path / "out")
    there = [source_clip("a", "train", "film1"), source_clip("b", "validation", "film2")]
    missing = [
        source_clip("kept", "train", "film1"),
        source_clip("kept too", "train"),
        source_clip("shares", "train", "film2"),
        source_clip("shares with a missing one", "train", "film3"),
        source_clip("for tests", "test", "film3"),
        source_clip("says nothing", "train", captions=("...",)),
    ]
    entries = [Entry(clip, Wording.of(clip.captions), row) for row, clip in enumerate(there)]
    failures = [(clip, Failure("missing_file", "no pictures")) for clip in missing]
    write(out, entries, {}, DatasetOptions(allow_missing=True), missing=failures)
    assert "without frames, for their sentences: 2 training clips" in capsys.readouterr().err
    dataset = Dataset.load(out)
    assert [(clip.video, clip.captions, clip.row) for clip in dataset.unseen] == [
        ("kept", ("a dog",), -1),
        ("kept too", ("a dog",), -1),
    ]
    digest = dataset.digest()
    (out / "unseen.jsonl").unlink()  # as in folders of older versions
    assert Dataset.load(out).unseen == []
    assert Dataset.load(out).digest() != digest
    (out / "unseen.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match=r"unseen\.jsonl is damaged"):
        Dataset.load(out)


def test_imagined_features_are_for_a_frozen_encoder() -> None:
    with pytest.raises(UsageError, match="unseen_weight is for a frozen encoder"):
        stage(unseen_weight=1.0, encoder_learning_rate=0.1)


def test_a_stage_learns_words_that_only_clips_without_frames_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["a", "dog", "runs", "cat", "never"]
    clips = [
        {"video": f"v{row}", "row": row, "distinct": 1, "split": "train" if row < 8 else "validation"}
        for row in range(10)
    ]
    frames = np.random.default_rng(0).integers(256, size=(10, 67, 67, 3), dtype=np.uint8)
    data = dataset_folder(tmp_path / "data", clips, frames, words)
    torch.manual_seed(0)
    torch.save(Encoder("squeezenet1_1").state_dict(), tmp_path / "encoder.pt")
    settings = {"encoder": "squeezenet1_1", "crop_px": 64, "projection": 0, "views": 1, "smallest_crop": 1.0}
    sets = [f"--set={name}={value}" for name, value in settings.items()]
    sets += [f"--set={setting}" for setting in ("batch_clips=4", "epochs=1", "hidden_size=8", "embedding_size=6")]
    command = ["real", "--stage", "1", "--data", str(data), "--encoder-weights", str(tmp_path / "encoder.pt"), *sets]
    assert train.main([*command, "--out", str(tmp_path / "without")]) == 0
    assert "lists no clips without frames, so unseen_weight does nothing; to have" in capsys.readouterr().err
    unseen = [
        {"video": f"u{number}", "row": -1, "split": "train", "captions": ["a cat", "a cat runs"]} for number in range(5)
    ]
    (data / "unseen.jsonl").write_text("".join(json.dumps(line) + "\n" for line in unseen))
    assert train.main([*command, "--out", str(tmp_path / "with")]) == 0
    assert "unseen_weight does nothing" not in capsys.readouterr().err
    assert steps(tmp_path / "without" / "stage1") == 2
    assert steps(tmp_path / "with" / "stage1") == 4
    of_both = [
        checkpoints.load(tmp_path / name / "stage1" / "best.pt").model.decoder.embedding.weight
        for name in ("without", "with")
    ]
    cat, never = Vocabulary(words).encode("cat never")
    assert not torch.equal(of_both[0][cat], of_both[1][cat])
    assert torch.equal(of_both[0][never], of_both[1][never])
    rewarded = ["real", "--stage", "3", "--data", str(data), "--out", str(tmp_path / "with")]
    rewarded += [f"--set={setting}" for setting in ("batch_clips=4", "epochs=1", "views=1", "smallest_crop=1.0")]
    assert train.main(rewarded) == 0
    assert steps(tmp_path / "with" / "stage3") == 4


def steps(stage: Path) -> int:
    lines = map(json.loads, (stage / "log.jsonl").read_text().splitlines())
    return sum(line["kind"] == "step" for line in lines)
