"""Clips and captions become a dataset folder: complete, the same after a kill, and with every fault listed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from etenet.model.vocabulary import words
from etenet.video.sampling import sample_frames
from tests.clips import spoil, video
from tests.conftest import REPOSITORY, wait_until
from tests.test_sources import msvd_csv
from training import prepare
from training.data.caption_files import SPLITS
from training.data.datasets import Dataset
from training.demo import world

SIZE = ["--resize-px", "24"]
DEADLINE_S = 120.0
CAPTIONS = {
    "a": ("train", ["A dog\r\nruns.", "\ufeffthe dog runs", "a dog runs on and on"]),
    "b": ("train", ["a cat sleeps", "...", ""]),
    "c": ("validation", ["a\u00a0horse"]),
    "d": ("test", ["a dog sleeps"]),
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def jsonl(path: Path, captions: dict[str, tuple[str, list[str]]]) -> Path:
    entries = [{"video": name, "split": split, "captions": sentences} for name, (split, sentences) in captions.items()]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture
def own_clips(tmp_path: Path) -> list[str]:
    """Arguments that name four clips and their captions."""
    (tmp_path / "clips").mkdir()
    for number, name in enumerate(CAPTIONS):
        (tmp_path / "clips" / f"{name}.mp4").write_bytes(video(20 + number))
    captions = jsonl(tmp_path / "captions.jsonl", CAPTIONS)
    return ["folder", "--captions", str(captions), "--clips", str(tmp_path / "clips"), *SIZE]


def test_own_clips_become_a_dataset(own_clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert prepare.main([*own_clips, "--out", str(out), "--max-words", "4"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith("training: ")] == [  # those of the progress
        f"{out}: 4 clips",
        "  train: 2 clips, 4 captions",
        "  validation: 1 clips, 1 captions",
        "  test: 1 clips, 1 captions",
        "  vocabulary: 8 words that train captions use at least 1 times",
        "  captions without a word, dropped: 2",
        "  captions longer than 4 words, cut in training only: 1",
        "  skipped: 0 clips",
    ]
    assert (out / "skipped.jsonl").read_text() == ""
    dataset = Dataset.load(out)
    assert {split: [clip.video for clip in clips] for split, clips in dataset.clips.items()} == {
        "train": ["a", "b"],
        "validation": ["c"],
        "test": ["d"],
    }
    assert dataset.clips["train"][0].captions == ("A dog runs.", "the dog runs", "a dog runs on and on")
    assert dataset.clips["validation"][0].captions == ("a horse",)
    for clip in (clip for clips in dataset.clips.values() for clip in clips):
        file = dataset.clip_file(clip)
        assert file == tmp_path / "clips" / f"{clip.video}.mp4"
        sampled = sample_frames(file.read_bytes(), resize_px=24).frames
        np.testing.assert_array_equal(dataset.frames_of([clip])[0].numpy(), sampled)
    assert json.loads((out / "vocabulary.json").read_text()) == {
        "words": ["a", "dog", "runs", "on", "and", "cat", "sleeps", "the"],
        "splits": "train",
        "minimum_count": 1,
    }
    assert not list(out.glob("*.partial")) + list(out.glob(".*"))


def test_the_vocabulary_may_be_chosen_again_on_the_same_frames(own_clips: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*own_clips, "--out", str(out)]
    assert prepare.main(command) == 0
    made = (out / "frames.npy").stat()
    for name in "abcd":
        spoil(tmp_path / "clips" / f"{name}.mp4")
    assert prepare.main([*command, "--vocabulary-from", "all", "--minimum-count", "2"]) == 0
    assert Dataset.load(out).vocabulary().known_words == ("a", "dog", "runs", "on", "sleeps")
    assert (out / "frames.npy").stat().st_mtime_ns == made.st_mtime_ns


@pytest.mark.parametrize(
    "other", [["--resize-px", "32"], ["--seed", "1"], ["--captions", "other.jsonl"], ["--validation-share", "0.2"]]
)
def test_other_arguments_on_the_same_folder_are_refused(
    own_clips: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    other: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile("captions.jsonl", "other.jsonl")
    command = [*own_clips, "--out", "out"]
    assert prepare.main(command) == 0
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    capsys.readouterr()
    assert prepare.main([*command, *other]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"out was begun with {other[0][2:].replace('-', '_')} = " in error
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_a_changed_list_of_clips_on_the_same_folder_is_refused(
    own_clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*own_clips, "--out", str(tmp_path / "out")]
    assert prepare.main(command) == 0
    jsonl(tmp_path / "captions.jsonl", {"d": CAPTIONS["d"], **CAPTIONS})
    assert prepare.main(command) == 2
    assert "was begun with list of clips = sha256:" in capsys.readouterr().err


def test_what_cannot_be_used_is_skipped_listed_and_tried_again(
    own_clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips, out = tmp_path / "clips", tmp_path / "out"
    jsonl(tmp_path / "captions.jsonl", {**CAPTIONS, "e": ("train", ["a bird"]), "f": ("train", ["...", " "])})
    whole = (clips / "a.mp4").read_bytes()
    (clips / "a.mp4").write_bytes(whole[:300])
    shutil.copyfile(clips / "b.mp4", clips / "f.mp4")
    assert prepare.main([*own_clips, "--out", str(out)]) == 1
    skipped = lines(out / "skipped.jsonl")
    assert {line["video"]: (line["file"], line["error"]["code"]) for line in skipped} == {
        "a": (str(clips / "a.mp4"), "undecodable_video"),
        "f": (str(clips / "f.mp4"), "no_captions"),
        "e": (None, "missing_file"),
    }
    assert [line["video"] for line in lines(out / "manifest.jsonl")] == ["b", "c", "d"]
    error = capsys.readouterr().err
    assert "  skipped: 3 clips, listed in " in error
    assert "    e: no file below --clips is called e; put it there, or correct the name" in error
    assert "dog" not in Dataset.load(out).vocabulary().known_words

    (clips / "a.mp4").write_bytes(whole)
    shutil.copyfile(clips / "b.mp4", clips / "e.mp4")
    assert prepare.main([*own_clips, "--out", str(out)]) == 1
    assert [line["video"] for line in lines(out / "skipped.jsonl")] == ["f"]
    dataset = Dataset.load(out)
    assert [clip.video for clip in dataset.clips["train"]] == ["a", "b", "e"]
    a, b, e = dataset.frames_of(dataset.clips["train"]).numpy()
    np.testing.assert_array_equal(a, sample_frames(whole, resize_px=24).frames)
    np.testing.assert_array_equal(b, e)


def test_a_killed_run_continues_and_makes_the_same_folder(own_clips: list[str], tmp_path: Path) -> None:
    clips, late = tmp_path / "clips", tmp_path / "clips" / "late.mp4"
    jsonl(tmp_path / "captions.jsonl", {**CAPTIONS, "late": ("train", ["a bird"])})
    bodies = {path: path.read_bytes() for path in clips.iterdir()} | {late: video(30)}
    late.write_bytes(bodies[late])
    assert prepare.main([*own_clips, "--out", str(tmp_path / "straight")]) == 0

    # Reading this pipe blocks, because nothing writes to it: the run waits there until it is killed.
    late.unlink()
    os.mkfifo(late)
    out, progress = tmp_path / "out", tmp_path / "out" / "progress.jsonl"
    command = [sys.executable, "-m", "training.prepare", *own_clips, "--out", str(out)]
    run = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: progress.is_file() and progress.read_bytes().count(b"\n") == 5, DEADLINE_S)
    finally:
        run.kill()
    run.communicate(timeout=DEADLINE_S)  # returns once all workers have ended: they hold the same stderr
    assert run.returncode == -9
    assert not (out / "manifest.jsonl").exists()
    assert not (out / "frames.npy").exists()

    late.unlink()
    late.write_bytes(bodies.pop(late))
    for path in bodies:
        spoil(path)
    assert prepare.main([*own_clips, "--out", str(out)]) == 0
    for name in ("frames.npy", "manifest.jsonl", "vocabulary.json", "skipped.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


def test_a_clip_that_was_replaced_gets_the_frames_of_the_new_file(own_clips: list[str], tmp_path: Path) -> None:
    clips, command = tmp_path / "clips", [*own_clips, "--out", str(tmp_path / "out")]
    assert prepare.main(command) == 0
    (clips / "a.mp4").write_bytes(video(35))
    (clips / "b.mp4").rename(clips / "b.avi")
    (clips / "b.avi").write_bytes(video(36, codec="mpeg4", container="avi"))
    assert prepare.main(command) == 0
    dataset = Dataset.load(tmp_path / "out")
    a, b = dataset.clips["train"]
    assert b.file == str(clips / "b.avi")
    for clip in (a, b):
        sampled = sample_frames(dataset.clip_file(clip).read_bytes(), resize_px=24).frames
        np.testing.assert_array_equal(dataset.frames_of([clip])[0].numpy(), sampled)


def test_a_dataset_folder_may_be_moved_with_its_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [replace(clip, split=split) for clip, split in zip(world.clips(), ("train", "test"), strict=False)]
    monkeypatch.setattr(world, "clips", lambda **_: iter(few))
    assert prepare.main(["demo", "--out", str(tmp_path / "demo")]) == 0
    (tmp_path / "demo").rename(tmp_path / "moved")
    dataset = Dataset.load(tmp_path / "moved")
    (clip,) = dataset.clips["test"]
    assert dataset.clip_file(clip) == tmp_path / "moved" / "clips" / f"{few[1].name}.mp4"
    sampled = sample_frames(dataset.clip_file(clip).read_bytes(), resize_px=118).frames
    np.testing.assert_array_equal(dataset.frames_of([clip])[0].numpy(), sampled)
    assert list(clip.captions) == world.references(few[1])
    assert world.Combination(**clip.labels) == few[1].combination


def test_a_part_of_the_demo_world_is_prepared_for_a_larger_encoder(tmp_path: Path) -> None:
    size = ["--encoder", "inceptionresnetv2", "--train-per-combination", "1"]
    assert prepare.main(["demo", *size, "--clips-per-split", "1", "--out", str(tmp_path / "demo")]) == 0
    dataset = Dataset.load(tmp_path / "demo")
    assert dataset.frames.shape == (3, 16, 314, 314, 3)
    whole = list(world.clips(train_per_combination=1))
    for split, clips in dataset.clips.items():
        assert [clip.video for clip in clips] == [next(clip.name for clip in whole if clip.split == split)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder", "--captions", "none.json", "--clips", "."], "cannot read none.json: No such file or directory"),
        (["folder", "--captions", "c.json", "--clips", "none"], "none is not a folder; name the one that holds the"),
        (["folder", "--captions", "c.json", "--clips", ".", "--encoder", "resnet"], "unknown encoder 'resnet'"),
        (
            ["folder", "--captions", "c.json", "--clips", ".", "--test-share", "1"],
            "shares must be at least 0 and leave",
        ),
        (["msvd", "--csv", "none.csv", "--clips", "."], "cannot read none.csv"),
        (["features", "--features", "c.json", "--captions", "c.json"], "cannot read c.json: .*; save it with numpy"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.json").write_text('{"c.json": "a dog", "d": "a cat", "e": "a bird"}')
    assert prepare.main([*arguments, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"training.prepare {arguments[0]}: ")
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_the_real_clips_become_a_dataset_without_the_broken_one(reference_data: Path, tmp_path: Path) -> None:
    described: dict[str, Any] = json.loads((reference_data / "clips_captions.json").read_text())
    captions = {name: (SPLITS[clip["split"]], clip["captions"]) for name, clip in described.items()}
    captions["odd_clips/invalid-bitstream.webm"] = ("train", ["nothing to see"])
    source = ["--captions", str(jsonl(tmp_path / "f.jsonl", captions)), "--clips", str(reference_data)]
    assert prepare.main(["folder", *source, *SIZE, "--out", str(tmp_path / "out")]) == 1
    (skipped,) = lines(tmp_path / "out" / "skipped.jsonl")
    assert skipped["video"] == "odd_clips/invalid-bitstream.webm"
    assert skipped["error"]["code"] == "undecodable_video"
    dataset = Dataset.load(tmp_path / "out")
    clips = {clip.video: clip for of_split in dataset.clips.values() for clip in of_split}
    assert clips.keys() == described.keys()
    assert len(clips) == 42
    for name, clip in clips.items():
        assert list(clip.captions) == [" ".join(caption.split()) for caption in described[name]["captions"]]
        sampled = sample_frames((reference_data / name).read_bytes(), resize_px=24).frames
        np.testing.assert_array_equal(dataset.frames_of([clip])[0].numpy(), sampled, err_msg=name)
    known = set(dataset.vocabulary().known_words)
    assert known == {word for clip in dataset.clips["train"] for caption in clip.captions for word in words(caption)}


def test_distributed_msvd_and_msrvtt_become_datasets_of_the_clips_that_are_there(
    reference_data: Path, tmp_path: Path
) -> None:
    described: dict[str, Any] = json.loads((reference_data / "clips_captions.json").read_text())
    corpus = msvd_csv(tmp_path / "c.csv", json.loads((reference_data / "msvd" / "captions_by_clip.json").read_text()))
    annotations = [str(path) for path in sorted((reference_data / "msrvtt").glob("*.zip"))]
    for name, source in (("msvd", ["--csv", str(corpus)]), ("msrvtt", ["--annotations", *annotations])):
        out = tmp_path / name
        clips = ["--clips", str(reference_data / name / "clips")]
        assert prepare.main([name, *source, *clips, *SIZE, "--out", str(out)]) == 1
        prepared = {Path(line["file"]).name: line for line in lines(out / "manifest.jsonl")}
        there = {Path(path).name: clip for path, clip in described.items() if path.startswith(name)}
        assert prepared.keys() == there.keys()
        for file, line in prepared.items():
            assert line["split"] == SPLITS[there[file]["split"]]
            assert len(line["captions"]) == len(there[file]["captions"])
        assert {line["error"]["code"] for line in lines(out / "skipped.jsonl")} == {"missing_file"}
