"""Still frames and photographs become clips: each stored once, in order of time, resized as serving resizes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from etenet.errors import UndecodableVideo, UsageError
from etenet.video.sampling import middle_of_slices, sample_frames
from tests.clips import pattern, spoil
from tests.conftest import REPOSITORY
from training import prepare
from training.data import sources, still_frames
from training.data.datasets import Dataset
from training.data.splits import Shares, read_ids, without, without_shared_sources
from training.data.still_frames import Picture, Stills, StillsJob

SHARES = Shares(validation=0.0, test=0.0, seed=0)


def picture(number: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pattern(number, 40, 30)).save(file, kind)
    return file.getvalue()


def resized(number: int, size_px: int = 24) -> NDArray[np.uint8]:
    small = Image.fromarray(pattern(number, 40, 30)).resize((size_px, size_px), Image.Resampling.BILINEAR)
    return np.asarray(small)


FILES = {
    "video9/1_2.png": picture(0),
    "video9/1_10.png": picture(1),
    "video9/notes.txt": b"no picture",
    "video9/._1_2.png": b"of another system",
    "deep/video10/0.PNG": picture(2),
    "beach.png": picture(3),
    **{f"long/{number}.png": picture(number) for number in range(20)},
}


def as_folder(at: Path) -> Path:
    for name, body in FILES.items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(body)
    return at


def as_tar(at: Path, kind: str = "w", prefix: str = "./") -> Path:
    with tarfile.open(at, kind) as archive:
        for name, body in reversed(FILES.items()):
            member = tarfile.TarInfo(prefix + name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return at


@pytest.fixture(params=["folder", "tar"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return as_folder(tmp_path / "frames") if request.param == "folder" else as_tar(tmp_path / "frames.tar")


def test_the_pictures_of_a_clip_are_found_in_order_of_time(place: Path) -> None:
    stills = Stills([place])

    def names(clip: str) -> list[str]:
        return [found.name for found in stills.find(clip)]

    assert names("video9") == ["video9/1_2.png", "video9/1_10.png"]
    assert names("video10") == names("deep/video10") == ["deep/video10/0.PNG"]
    assert names("beach") == names("beach.png") == ["beach.png"]
    assert names("long") == [f"long/{number}.png" for number in middle_of_slices(20)]
    assert names("1_2") == names("nobody") == []
    assert [found.read() for found in stills.find("video9")] == [picture(0), picture(1)]
    frames = StillsJob(0, stills.find("video9")).frames(24)
    np.testing.assert_array_equal(frames, [resized(0), resized(1)])


def test_a_still_is_resized_as_serving_resizes_a_frame_of_the_clip() -> None:
    """The colours are converted before the resizing and not after it: that is all that differs."""
    for clip in sorted((REPOSITORY / "examples").glob("*.mp4"))[:3]:
        with av.open(clip) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        served = sample_frames(clip.read_bytes(), resize_px=90).frames
        for moment, place in list(enumerate(middle_of_slices(len(frames))))[::5]:
            file = io.BytesIO()
            Image.fromarray(frames[place]).save(file, "png")
            still = still_frames.resized(file.getvalue(), "frame", size_px=90)
            assert np.abs(still.astype(int) - served[moment]).mean() < 2


@pytest.mark.parametrize("kind", ["webp", "jpeg", "png"])
def test_pictures_of_all_kinds_become_rgb(kind: str) -> None:
    for mode in ("RGB", "L", "RGBA", "P", "CMYK"):
        file = io.BytesIO()
        given = Image.fromarray(pattern(0, 40, 30)).convert(mode)
        if (kind, mode) not in {("jpeg", "RGBA"), ("jpeg", "P"), ("png", "CMYK"), ("webp", "CMYK")}:
            given.save(file, kind)
            assert still_frames.resized(file.getvalue(), "a", size_px=8).shape == (8, 8, 3)


def test_a_picture_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for body in (b"", b"no picture", picture(0)[:100]):
        with pytest.raises(UndecodableVideo, match=r"a/1.png cannot be read as a picture \(.*\); save it again or"):
            still_frames.resized(body, "a/1.png", size_px=8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UndecodableVideo, match=r"a/1.png cannot be read as a picture \(Image size \(1200 pixels\) exc"):
        still_frames.resized(picture(0), "a/1.png", size_px=8)


def test_places_that_cannot_be_meant_are_named(tmp_path: Path) -> None:
    folder, again = as_folder(tmp_path / "frames"), as_tar(tmp_path / "again.tar")
    with pytest.raises(UsageError, match=r"\w+ is in .*again.tar and in a place before it; keep the pictures of one"):
        Stills([folder, again])
    with pytest.raises(UsageError, match=r"neither a folder nor a whole, uncompressed tar .*; unpack it, and give"):
        Stills([as_tar(tmp_path / "small.tar.gz", "w:gz")])
    with pytest.raises(UsageError, match=r"nowhere.tar is neither .*No such file"):
        Stills([tmp_path / "nowhere.tar"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty: no pictures \(.webp, "):
        Stills([tmp_path / "empty"])
    (folder / "other" / "video9").mkdir(parents=True)
    (folder / "other" / "video9" / "1.png").write_bytes(picture(0))
    with pytest.raises(UsageError, match=r"video9 may be frames/.*video9 and frames/.*video9; name"):
        Stills([tmp_path]).find("video9")
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps({"beach": "a", "beach.png": "b"}))
    with pytest.raises(UsageError, match=r"beach and beach.png are the same pictures, beach.png; use one name"):
        sources.stills([folder], SHARES, captions=captions)
    captions.write_text(json.dumps({"nobody": "a"}))
    with pytest.raises(UsageError, match=r"none of the 1 clips \(nobody, ...\) has pictures in .*frames; put those"):
        sources.stills([folder], SHARES, captions=captions)


def test_stills_become_a_dataset_that_stores_each_once(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions, out = tmp_path / "captions.jsonl", tmp_path / "out"
    entries = [("video9", "train"), ("lost", "train"), ("beach", "train"), ("long", "validation")]
    captions.write_text("".join(json.dumps({"video": v, "split": s, "caption": "a dog"}) + "\n" for v, s in entries))
    command = ["frames", "--frames", str(place), "--captions", str(captions), "--resize-px", "24", "--out", str(out)]
    assert prepare.main(command) == 1
    assert "lost: no pictures are called lost; put them into a place of --frames" in capsys.readouterr().err
    assert prepare.main([*command, "--allow-missing"]) == 0
    dataset = Dataset.load(out)
    assert np.load(out / "frames.npy").shape == (2 + 1 + 16, 24, 24, 3)
    video, beach = dataset.clips["train"]
    (long,) = dataset.clips["validation"]
    assert (video.distinct, beach.distinct, long.distinct) == (2, 1, 16)
    np.testing.assert_array_equal(dataset.frames_of([video])[0].numpy(), [resized(0)] * 8 + [resized(1)] * 8)
    np.testing.assert_array_equal(dataset.frames_of([beach])[0].numpy(), [resized(3)] * 16)
    np.testing.assert_array_equal(dataset.frames_of([long])[0].numpy(), [resized(n) for n in middle_of_slices(20)])
    with pytest.raises(UsageError, match="was made from stills; it has no video of beach"):
        dataset.clip_file(beach)


def test_a_damaged_still_costs_its_clip_and_is_tried_again(tmp_path: Path) -> None:
    folder, captions, out = as_folder(tmp_path / "frames"), tmp_path / "captions.json", tmp_path / "out"
    captions.write_text(json.dumps({"video9": "a dog", "beach": "a beach", "video10": "a cat"}))
    (folder / "video9" / "1_10.png").write_bytes(b"")
    command = ["frames", "--frames", str(folder), "--captions", str(captions), "--resize-px", "24", "--out", str(out)]
    assert prepare.main([*command, "--allow-missing"]) == 1
    (skipped,) = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert (skipped["video"], skipped["error"]["code"]) == ("video9", "undecodable_video")
    (folder / "video9" / "1_10.png").write_bytes(picture(1))
    spoil(folder / "beach.png")
    assert prepare.main(command) == 0
    np.testing.assert_array_equal(
        np.load(out / "frames.npy"), np.stack([resized(0), resized(1), resized(3), resized(2)])
    )
    (folder / "beach.png").write_bytes(picture(7))
    assert prepare.main(command) == 0
    np.testing.assert_array_equal(np.load(out / "frames.npy")[2], resized(7))
    (folder / "deep" / "video10" / "1.png").write_bytes(picture(4))
    assert prepare.main(command) == 2, "with a picture more, the rows are others"


def test_the_real_stills_are_those_of_the_official_splits(reference_data: Path, tmp_path: Path) -> None:
    folder = reference_data / "msrvtt"
    clips = sources.stills(
        [folder / "frames" / f"{split}.tar" for split in ("train", "validate", "test")],
        SHARES,
        annotations=sorted(folder.glob("*.zip")),
    )

    def count(clips: dict[int, sources.SourceClip]) -> list[int]:
        there = [clip.split for clip in clips.values() if clip.pictures]
        return [there.count(split) for split in ("train", "validation", "test")]

    every = dict(enumerate(clips))
    assert count(every) == [3_151, 244, 1_186]
    assert sum(len(clip.pictures) for clip in clips) == 16_572
    assert all(1 < len(clip.pictures) <= 5 for clip in clips if clip.pictures)
    assert count(without_shared_sources(every)) == [3_151, 244, 1_186], "the official splits share no source"
    whole = json.loads((reference_data / "clips_captions.json").read_text())
    ids = tmp_path / "whole.txt"
    ids.write_text("\n".join(["# the whole clips", *(clip.get("youtube") or clip["vid"] for clip in whole.values())]))
    kept = without(every, read_ids(ids))
    assert count(kept) == [3_141, 244, 1_172]
    left = {clip.source for clip in kept.values()}
    assert not left & {clip.source for clip in clips if clip.video in {clip["vid"] for clip in whole.values()}}
    found = Picture.pixels(clips[1].pictures[0], 273)
    assert found.shape == (273, 273, 3)
    assert found.std() > 10


def test_the_real_photographs_are_all_there(reference_data: Path) -> None:
    folder = reference_data / "flickr8k"
    clips = sources.stills([folder / "images.tar"], SHARES, captions=folder / "captions.json")
    assert len(clips) == 8_091
    assert all(len(clip.pictures) == 1 and len(clip.captions) == 5 for clip in clips)
