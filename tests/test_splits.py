"""Clips of one source never fall on both sides of a split, and clips are left out with all that share theirs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from etenet.errors import UsageError
from tests.clips import video
from tests.test_prepare import SIZE
from training import prepare
from training.data import sources
from training.data.caption_files import Described, read_captions
from training.data.datasets import Dataset
from training.data.source_clip import SourceClip
from training.data.splits import Shares, read_ids, splits_of, without, without_shared_sources

SHARES = Shares(validation=0.1, test=0.2, seed=0)


def grouped(*sizes: int) -> dict[str, Described]:
    return {
        f"{film}-{clip}": Described(["a"], group=f"film {film}")
        for film, size in enumerate(sizes)
        for clip in range(size)
    }


@pytest.mark.parametrize("seed", range(8))
def test_shares_keep_groups_together(seed: int) -> None:
    described = grouped(*(1 + number % 5 for number in range(60)))
    shares = Shares(validation=0.1, test=0.2, seed=seed)
    splits = splits_of(described, Path("f"), shares)
    sides = {(clip.group, splits[name]) for name, clip in described.items()}
    assert len(sides) == 60, "each group is on one side"
    counts = Counter(splits.values())
    assert counts["test"] == pytest.approx(0.2 * 180, abs=2)
    assert counts["validation"] == pytest.approx(0.1 * 180, abs=2)
    assert splits_of(dict(reversed(described.items())), Path("f"), shares) == splits


def test_large_groups_still_leave_something_for_every_split() -> None:
    splits = splits_of(grouped(50, 30, 20), Path("f"), SHARES)
    assert set(splits.values()) == {"train", "validation", "test"}
    with pytest.raises(UsageError, match="f: of 40 clips in 2 groups none is left to train on"):
        splits_of(grouped(20, 20), Path("f"), SHARES)


def test_a_given_split_that_divides_a_group_is_an_error_that_names_it() -> None:
    described = grouped(2, 2)
    for name, clip in described.items():
        clip.split = "train" if name != "1-1" else "test"
    with pytest.raises(UsageError, match=r"f: group 'film 1' is on two sides: 1-0 is for train and 1-1 for test; give"):
        splits_of(described, Path("f"), SHARES)
    described["1-0"].split = "test"
    assert Counter(splits_of(described, Path("f"), SHARES).values()) == {"train": 2, "test": 2}


def test_groups_are_read_from_tables_and_lines(tmp_path: Path) -> None:
    file = tmp_path / "f.csv"
    file.write_text("video,caption,group\na,b,7\na,c,7\nd,e,\n")
    assert read_captions(file) == {"a": Described(["b", "c"], group="7"), "d": Described(["e"])}
    file.write_text('{"video": "a", "caption": "b", "group": 7}\n{"video": "d", "caption": "e", "group": "film"}\n')
    assert {name: clip.group for name, clip in read_captions(file).items()} == {"a": "7", "d": "film"}
    for contents, message in (
        ('{"video": "a", "caption": "b", "group": [7]}', r"the group of a is \[7\]; it must be a name or a number"),
        ('{"video": "a", "caption": "b", "group": 1}\n{"video": "a", "caption": "c"}', "another split, group or row"),
    ):
        file.write_text(contents)
        with pytest.raises(UsageError, match=message):
            read_captions(file)


def test_ids_are_read_without_comments(tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    file.write_text("# whole clips\nvideo7\n\n  take#3.mp4  # the loud one\r\n")
    assert read_ids(file) == ["video7", "take#3.mp4"]
    file.write_text("# none\n")
    with pytest.raises(UsageError, match=r"ids.txt has no id; give the id of a clip on each line"):
        read_ids(file)


def clip(name: str, source: str | None = None, split: str = "train", alias: str | None = None) -> SourceClip:
    return SourceClip(video=name, split=split, captions=("a",), source=source, alias=alias)


def test_a_clip_is_left_out_with_all_that_share_its_source() -> None:
    every = [
        clip("video1", "A1_b-c"),
        clip("video2", "A1_b-c", "test"),
        clip("video3", "other"),
        clip("video4"),
        clip("A1_b-c_10_20", "A1_b-c", alias="vid7"),
        clip("video5", "film"),
    ]
    clips = dict(enumerate(every))

    def left(*ids: str) -> list[int]:
        return sorted(without(clips, ids))

    assert left("video1") == left("vid7") == left("A1_b-c") == left("A1_b-c_10_20") == [2, 3, 5]
    assert left("A1_b-c_90_99") == [2, 3, 5], "a clip of another data set, of the same YouTube video"
    assert left("video4") == [0, 1, 2, 4, 5]
    assert left("nobody") == [0, 1, 2, 3, 4, 5]
    assert left("film", "video4") == [0, 1, 2, 4]


def test_test_clips_of_a_source_that_is_trained_on_are_left_out() -> None:
    every = [clip("a", "x"), clip("b", "x", "test"), clip("c", "y", "test"), clip("d", None, "test"), clip("e")]
    assert sorted(without_shared_sources(dict(enumerate(every)))) == [0, 2, 3, 4]


def test_msvd_and_msrvtt_know_their_sources(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for number in range(1970):
        (tmp_path / "clips" / f"_-x{number // 2:04}_{number}_{number + 9}.avi").touch()
    sentences = tmp_path / "sentences.txt"
    sentences.write_text("vid1\ta dog\nvid2\ta cat\nvid3\ta bird\n")
    one, two, three = sources.msvd(tmp_path / "clips", sentences=[sentences])
    assert (one.video, one.alias, one.source) == ("vid1", "_-x0000_0_9", "_-x0000")
    assert two.source == one.source != three.source
    annotation = {
        "videos": [
            {"video_id": "video0", "split": "train", "url": "https://www.youtube.com/watch?v=9lZi22q-_Eo&t=3"},
            {"video_id": "video1", "split": "train"},
        ],
        "sentences": [],
    }
    (tmp_path / "a.json").write_text(json.dumps(annotation))
    described = sources.msrvtt_videos([tmp_path / "a.json"])
    assert [video.group for video in described.values()] == ["9lZi22q-_Eo", None]


def test_prepare_leaves_clips_out_and_says_how_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips, out = tmp_path / "clips", tmp_path / "out"
    clips.mkdir()
    videos, urls = ("train", "train", "validate", "test", "test"), ("a", "b", "c", "a", "d")
    described = [
        {"video_id": f"video{number}", "split": split, "url": f"https://www.youtube.com/watch?v={url}"}
        for number, (split, url) in enumerate(zip(videos, urls, strict=True))
    ]
    sentences = [{"video_id": video["video_id"], "caption": "a dog", "sen_id": 0} for video in described]
    (tmp_path / "a.json").write_text(json.dumps({"videos": described, "sentences": sentences}))
    for number in range(5):
        (clips / f"video{number}.mp4").write_bytes(video(20))
    (tmp_path / "ids.txt").write_text("video1\n")
    command = ["msrvtt", "--clips", str(clips), "--annotations", str(tmp_path / "a.json"), *SIZE, "--out"]
    more = ["--exclude", str(tmp_path / "ids.txt"), "--drop-shared-sources"]
    assert prepare.main([*command, str(out), *more]) == 0
    error = capsys.readouterr().err
    assert "ids.txt and as they share a source with these: 1 clip (1 train)" in error
    assert "left out as a training clip has the same source: 1 clip (1 test)" in error
    left = {split: [clip.video for clip in of] for split, of in Dataset.load(out).clips.items()}
    assert left == {"train": ["video0"], "validation": ["video2"], "test": ["video4"]}
    (tmp_path / "ids.txt").write_text("a\nb\nc\nd\n")
    assert prepare.main([*command, str(tmp_path / "none"), *more]) == 2
    assert "ids.txt leaves out every clip; name fewer" in capsys.readouterr().err


def test_a_data_set_without_validation_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.mp4").write_bytes(video(20))
    (tmp_path / "f.csv").write_text("video,caption,split\na,a dog,train\n")
    command = ["folder", "--captions", str(tmp_path / "f.csv"), "--clips", str(tmp_path), *SIZE]
    assert prepare.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "  warning: no validation split: training.train needs one" in capsys.readouterr().err
    (tmp_path / "f.csv").write_text("video,caption,split\na,a dog,test\n")
    assert prepare.main([*command, "--out", str(tmp_path / "other")]) == 0
    assert "  warning: no train split: there is nothing to learn from" in capsys.readouterr().err
