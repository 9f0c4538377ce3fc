"""Every sample of docs/data.md is read as the page says, and each format that is read has a sample there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.test_readme import test_its_long_commands_know_the_options_they_name as options_exist
from tests.test_still_frames import picture
from training.data import given_features, sources
from training.data.caption_files import read_captions
from training.data.dataset_folder import DatasetOptions, write
from training.data.datasets import Dataset
from training.data.frame_cache import Failure
from training.data.source_clip import SourceClip
from training.data.splits import Shares, read_ids, splits_of, without
from training.data.still_frames import Stills

PAGE = (REPOSITORY / "docs" / "data.md").read_text()
SAMPLES: dict[str, str] = dict(re.findall(r"^```(?:json|csv|text) (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
SHARES = Shares(validation=0.1, test=0.1, seed=0)


def sample(name: str, folder: Path) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(SAMPLES[name])
    return path


def test_no_sample_is_unread() -> None:
    read = {name for name in SAMPLES if f'"{name}"' in Path(__file__).read_text()}
    assert read == SAMPLES.keys()
    assert PAGE.count("\n```") == 2 * (len(SAMPLES) + 1), "a sample without a name"


def test_captions_files(tmp_path: Path) -> None:
    described = {
        name: read_captions(sample(name, tmp_path)) for name in ("captions.json", "captions.jsonl", "captions.csv")
    }
    assert list(described["captions.json"]) == ["dog.mp4", "night/owl.mp4"]
    assert len(described["captions.json"]["dog.mp4"].captions) == 2
    lines = described["captions.jsonl"]
    splits = splits_of(lines, Path("f"), SHARES)
    assert splits == {"dog.mp4": "train", "dog-swims.mp4": "train", "owl.mp4": "validation", "cat.mp4": "test"}
    table = described["captions.csv"]
    assert table["dog.mp4"].captions[1] == "a dog, brown and wet, is running"
    for clips in (lines, table):
        assert clips["dog.mp4"].group == clips["dog-swims.mp4"].group == "holiday film"
        assert clips["owl.mp4"].group is None
    divided = splits_of(table, Path("f"), Shares(validation=0.3, test=0.0, seed=0))
    assert divided == {"dog.mp4": "train", "dog-swims.mp4": "train", "owl.mp4": "validation"}


def test_places_of_still_frames(tmp_path: Path) -> None:
    for name in SAMPLES["frames.txt"].split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(0))
    stills = Stills([tmp_path])
    counts = {name: len(stills.find(name)) for name in ("video7", "video8", "1000268201_693b08cb0e", "video9")}
    assert counts == {"video7": 2, "video8": 1, "1000268201_693b08cb0e": 1, "video9": 0}


def test_clips_to_leave_out(tmp_path: Path) -> None:
    ids = read_ids(sample("exclude.txt", tmp_path))
    assert ids == ["video176", "vid184", "3qqEKTPxLNs_1_15", "holiday film"]
    table = read_captions(sample("captions.csv", tmp_path))
    clips = {
        name: SourceClip(video=name, split="train", captions=tuple(clip.captions), source=clip.group)
        for name, clip in table.items()
    }
    assert list(without(clips, ids)) == ["owl.mp4"]


def test_distributed_files(tmp_path: Path) -> None:
    assert list(sources.msvd_corpus(sample("msvd.csv", tmp_path))) == ["mv89psg6zh4_33_46"]
    sentences = sources.msvd_sentences([sample("msvd.txt", tmp_path)])
    assert {number: len(captions) for number, captions in sentences.items()} == {1: 2, 1201: 1}
    videos = sources.msrvtt_videos([sample("videodatainfo.json", tmp_path)])
    assert [(name, video.split, video.group) for name, video in videos.items()] == [
        ("video0", "train", "9lZi22qLlEo"),
        ("video7010", "test", "Sa4BUsvAcjc"),
    ]


def test_features(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.zeros((2, 4, 3), np.float32))
    clips = given_features.clips_by_row(tmp_path / "f.npy", sample("features.jsonl", tmp_path), SHARES)
    assert {row: (clip.video, clip.split) for row, clip in clips.items()} == {
        1: ("dog", "train"),
        0: ("owl", "validation"),
    }


@pytest.mark.parametrize(("manifest", "shape"), [("manifest.jsonl", (2, 16)), ("stills/manifest.jsonl", (3,))])
def test_a_dataset_folder(tmp_path: Path, manifest: str, shape: tuple[int, ...]) -> None:
    folder = sample(manifest, tmp_path).parent
    (folder / "vocabulary.json").write_text(SAMPLES["vocabulary.json"])
    np.save(folder / "frames.npy", np.zeros((*shape, 4, 4, 3), np.uint8))
    dataset = Dataset.load(folder)
    clips = [*dataset.need("train"), *dataset.need("validation")]
    assert dataset.frames_of(clips).shape == (2, 16, 4, 4, 3)
    assert dataset.vocabulary().known_words[:2] == ("a", "dog")


def test_a_list_of_skipped_clips_is_what_prepare_writes(tmp_path: Path) -> None:
    (shown,) = [json.loads(line) for line in SAMPLES["skipped.jsonl"].splitlines()]
    clip = SourceClip(video=shown["video"], split="train", captions=("a",))
    write(tmp_path, [], {}, DatasetOptions(), missing=[(clip, Failure(**shown["error"]))])
    assert [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == [shown]


@pytest.mark.parametrize("command", "".join(re.findall(r"^```sh long\n(.*?)^```", PAGE, re.M | re.S)).splitlines())
def test_its_commands_know_the_options_they_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    options_exist(command, capsys)
