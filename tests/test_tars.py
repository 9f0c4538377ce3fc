"""Each sample of a tar is a clip that is read in place, and a tar that is hostile or damaged harms nobody."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from ray.data._internal.datasource import webdataset_datasource as peer

from etenet.jobs import inputs, run, tars
from etenet.jobs.inputs import JobClip, Skipped
from etenet.jobs.tars import BrokenTar

LONG = "folder/" * 30 + "é" * 40
SAMPLES = {
    "000000": {"json": b'{"fps": 25}', "mp4": b"first" * 300, "txt": b"a dog"},
    "deep.er/000001": {"webm": b"second"},
    "000002": {"cam.json": b"{}", "cam.AVI": b"third" * 1000, "npy": b""},
    LONG: {"mp4": b"fourth" * 512, "json": b"x" * 512},
    "no video": {"jpg": b"picture", "txt": b"text"},
}
VIDEOS = [b"first" * 300, b"second", b"third" * 1000, b"fourth" * 512]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def members(prefix: str = "") -> list[tuple[str, bytes]]:
    return [(f"{prefix}{key}.{name}", body) for key, sample in SAMPLES.items() for name, body in sample.items()]


def special(name: str, kind: bytes, **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for attribute, value in more.items():
        setattr(info, attribute, value)
    return info


def bodies(clips: Iterable[JobClip]) -> list[object]:
    return [run.read(clip.source, 10_000) for clip in clips]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_the_clips_of_a_tar_are_the_samples_that_others_find_in_it(format: int, prefix: str, tmp_path: Path) -> None:
    path, skipped = write_tar(tmp_path / "shard.tar", members(prefix), format), Skipped()
    clips = inputs.clips([str(path)], skipped=skipped)
    assert bodies(clips) == VIDEOS
    assert str(skipped) == "2 files (.jpg 1, .txt 1)"
    with path.open("rb") as file:
        found = list(peer._group_by_keys(peer._tar_file_iterator(file)))
    assert [clip.sample.key for clip in clips if clip.sample] == [
        sample["__key__"].removeprefix(prefix) for sample in found if sample["__key__"] != f"{prefix}no video"
    ]
    names = [f"{key}.{name}" for key, sample in SAMPLES.items() for name in sample]
    assert [clip.video for clip in clips] == [f"{path}/{names[at]}" for at in (1, 3, 5, 7)]
    assert run.read(clips[0].source, 5) == {
        "error": {"code": "too_large", "message": "the video has more than 5 bytes, the limit; give a shorter clip"}
    }


def test_of_several_videos_in_a_sample_one_is_the_clip(tmp_path: Path) -> None:
    path, skipped = tmp_path / "shard.tar", Skipped()
    write_tar(path, [("1.left.mp4", b"left"), ("1.mp4", b"whole"), ("1.right.mp4", b"right"), ("2.gif", b"gif")])
    assert bodies(inputs.clips([str(path)], skipped=skipped)) == [b"whole", b"gif"]
    assert str(skipped) == "2 files (further video of a sample 2)"


def test_what_could_harm_whoever_unpacks_a_tar_is_left_out_of_the_clips(tmp_path: Path) -> None:
    path, skipped = tmp_path / "shard.tar", Skipped()
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    with tarfile.open(path, "w") as tar:
        for name in (
            "first.mp4",
            "/absolute.mp4",
            "../climbs.mp4",
            "a/../../b.mp4",
            ".hidden.mp4",
            "._mac.mp4",
        ):
            tar.addfile(special(name, tarfile.REGTYPE, size=4), io.BytesIO(name[:4].encode()))
        tar.addfile(special("soft.mp4", tarfile.SYMTYPE, linkname=str(tmp_path / "secret.mp4")))
        tar.addfile(special("hard.mp4", tarfile.LNKTYPE, linkname="first.mp4"))
        tar.addfile(special("device.mp4", tarfile.CHRTYPE, devmajor=1, devminor=5))
        tar.addfile(special("pipe.mp4", tarfile.FIFOTYPE))
        tar.addfile(special("folder.mp4", tarfile.DIRTYPE))
        tar.addfile(special("sparse.mp4", tarfile.GNUTYPE_SPARSE))
        for name in ("last.mp4", "first.mp4"):
            tar.addfile(special(name, tarfile.REGTYPE, size=4), io.BytesIO(name[:4].encode()))
    assert bodies(inputs.clips([str(path)], skipped=skipped)) == [b"firs", b"last"]
    assert skipped.files == {
        "link in a tar": 2,
        "no regular file in a tar": 2,
        "sparse file in a tar": 1,
        "name in a tar that leads out of a folder": 3,
        ".mp4": 2,
        "sample whose key is there twice in a tar": 1,
    }


def test_a_tar_that_is_cut_off_anywhere_loses_no_clip_without_a_word(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "whole.tar", members())
    body, cut = path.read_bytes(), tmp_path / "cut.tar"
    whole = inputs.clips([str(path)])
    ends = [-(-(clip.sample.offset + clip.sample.size) // 512) * 512 for clip in whole if clip.sample]
    for length in range(0, len(body.rstrip(b"\0")), 200):
        cut.write_bytes(body[:length])
        *clips, last = inputs.clips([str(cut)])
        assert bodies(clips) == VIDEOS[: sum(end <= length for end in ends)]
        (error,) = bodies([last])
        assert isinstance(error, dict)
        assert error["error"]["message"].endswith("; copy it again")
        assert error["error"]["message"].startswith(f"{cut}: it is ")


def test_garbage_between_samples_is_an_error_too(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "shard.tar", members())
    body = bytearray(path.read_bytes())
    third = inputs.clips([str(path)])[2].sample
    assert third
    body[third.begin : third.begin + 512] = b"\x55" * 512
    path.write_bytes(body)
    *clips, last = inputs.clips([str(path)])
    assert bodies(clips) == VIDEOS[:2]
    assert last.fault == "it is damaged: a header is none; copy it again"


class Watched(io.FileIO):
    """A file that notes the largest read."""

    largest = 0

    def read(self, size: int = -1) -> bytes:
        self.largest = max(self.largest, size)
        return super().read(size)


def header(name: str, kind: bytes, size: int) -> bytes:
    return special(name, kind, size=size).tobuf(tarfile.GNU_FORMAT)


BOMBS = {
    "a name of gigabytes": header("x", tarfile.GNUTYPE_LONGNAME, 2**34),
    "attributes of gigabytes": header("x", tarfile.XHDTYPE, 2**34),
    "attributes of the whole tar of gigabytes": header("x", tarfile.XGLTYPE, 2**34),
    "a size below zero": header("1.mp4", tarfile.REGTYPE, -512) * 3,
    "a size that points at its own header": header("1.mp4", tarfile.REGTYPE, -1024) * 3,
    "a size beyond every file": header("1.mp4", tarfile.REGTYPE, 2**80),
    "headers in headers": header("x", tarfile.XHDTYPE, 0) * 5000,
    "a size of the attributes below zero": (
        tarfile.TarInfo._create_pax_generic_header({"size": "-1536"}, tarfile.XHDTYPE, "utf-8")  # type: ignore[attr-defined]
        + header("1.mp4", tarfile.REGTYPE, 0)
    ),
    "nothing": b"",
    "no tar": b"RIFF" + bytes(range(256)) * 40,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_damage_and_takes_no_memory(bomb: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.tar"
    with path.open("wb") as file:
        file.write(BOMBS[bomb])
        file.truncate(2**35 if BOMBS[bomb] else 0)  # takes no room on the disk
    with Watched(path) as file, pytest.raises(BrokenTar, match="copy it again"):
        list(tars.members(file, Counter()))  # type: ignore[arg-type]
    assert file.largest <= tars.MAX_HEADER_BYTES


def test_a_compressed_tar_is_named_with_the_fix(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "shard.tar", members())
    path.write_bytes(gzip.compress(path.read_bytes()))
    (clip,) = inputs.clips([str(path)])
    assert clip.fault == "it is compressed, and clips are read in place; decompress it with gunzip"


def test_a_tar_without_end_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "shard.tar", members())
    monkeypatch.setattr(tars, "MAX_MEMBERS", 4)
    *clips, last = inputs.clips([str(path)])
    assert bodies(clips) == VIDEOS[:2]
    assert last.fault == "it has over 4 members; split it"


def test_a_tar_that_shrinks_after_it_was_listed_is_an_error_of_its_clips(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "shard.tar", members())
    clips = inputs.clips([str(path)])
    with path.open("r+b") as file:
        file.truncate(2000)
    first, *others = bodies(clips)
    assert isinstance(first, dict)
    assert first["error"]["message"] == f"{path}: it has become too short for 000000.mp4; copy it again"
    assert len(others) == 3


def test_tars_in_folders_lists_and_ranges_are_opened_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        path = tmp_path / "shards" / f"{number:03}.tar"
        path.parent.mkdir(exist_ok=True)
        write_tar(path, [("000.mp4", b"%d" % number)])
    wanted = [f"shards/{number:03}.tar/000.mp4" for number in range(12)]
    Path("list.txt").write_text("\n".join(f"shards/{number:03}.tar" for number in range(12)))
    for names in (
        ["shards"],
        ["shards/*.tar"],
        ["shards/{000..011}.tar"],
        ["shards/0{00,01}.tar", "shards/0{02..11}.tar"],
        ["list.txt"],
    ):
        clips = inputs.clips(names)
        assert [clip.video for clip in clips] == wanted, names
        assert bodies(clips) == [b"%d" % number for number in range(12)]
    assert [clip.video for clip in inputs.clips(["shards/0{1..0}{0..1}.tar", "shards/0{0..1}{0..1}.tar"])] == [
        wanted[number] for number in (0, 1, 10, 11)
    ]


def test_a_damaged_tar_costs_the_others_nothing(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", members())
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:700])
    clips = inputs.clips([str(tmp_path)])
    assert [clip.video for clip in clips if clip.fault] == [f"{tmp_path}/1.tar"]
    assert len(clips) == 2 * len(VIDEOS) + 1


def test_clips_of_a_tar_at_a_url_are_read_in_place(tmp_path: Path) -> None:
    import fsspec

    body = write_tar(tmp_path / "shard.tar", members()).read_bytes()
    with fsspec.open("memory://shards/0.tar", "wb") as file:
        file.write(body)
    for name in ("memory://shards/0.tar", "memory://shards/{0..0}.tar", "memory://shards"):
        assert bodies(inputs.clips([name])) == VIDEOS
