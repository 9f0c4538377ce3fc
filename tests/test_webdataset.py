"""A job writes shards that others read: what came with a sample, and its caption."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.data._internal.datasource import webdataset_datasource as peer

from etenet.cli import main
from etenet.errors import UsageError
from etenet.jobs import formats, inputs, run, webdataset
from etenet.jobs.formats import FORMATS
from etenet.jobs.inputs import JobClip
from etenet.jobs.run import KeyedRecords, OnSegments
from etenet.video.segments import Cut
from tests.conftest import CAPTION, EXAMPLES, REPOSITORY
from tests.test_tars import SAMPLES, members, write_tar


def echo(bodies: Iterable[tuple[str, bytes, Cut]], _on_segments: OnSegments) -> KeyedRecords:
    for key, body, _ in bodies:
        text = body[:6].decode()
        yield key, {"error": {"code": "bad", "message": "bad"}} if text.startswith("bad") else {"caption": text}


def do(names: list[str], out: Path) -> list[JobClip]:
    clips = inputs.clips(names)
    run.run(clips, run.of_bodies(echo, 10_000), out=out, format=formats.format_for(None, out))
    return clips


def read(*shards: Path) -> dict[str, dict[str, Any]]:
    """The samples of shards by key, as another program reads them. Fails if a key is there twice."""
    samples: dict[str, dict[str, Any]] = {}
    for shard in shards:
        with shard.open("rb") as file:
            for sample in peer._group_by_keys(peer._tar_file_iterator(file), meta={"__url__": shard.name}):
                assert sample["__key__"] not in samples
                samples[sample["__key__"]] = {name: sample[name] for name in sample if not name.startswith("__")}
    return samples


def test_shards_carry_their_samples_and_bring_the_captions(tmp_path: Path) -> None:
    shard, out = tmp_path / "in.tar", tmp_path / "out-%03d.tar"
    clips = {f"{number:03}": (REPOSITORY / "examples" / name).read_bytes() for number, name in enumerate(EXAMPLES)}
    write_tar(shard, [each for key, body in clips.items() for each in ((f"{key}.mp4", body), (f"{key}.cls", b"7"))])
    assert main([*CAPTION, str(shard), "--out", str(out)]) == 0
    samples = read(tmp_path / "out-000.tar")
    assert {key: (sample["mp4"], sample["cls"], sample["txt"].decode()) for key, sample in samples.items()} == {
        key: (clips[key], b"7", caption) for key, caption in zip(clips, EXAMPLES.values(), strict=True)
    }
    record = json.loads(samples["000"]["json"])
    assert (record["video"], record["caption"]) == (f"{shard}/000.mp4", next(iter(EXAMPLES.values())))


def test_what_a_sample_has_of_its_own_stays_and_an_old_caption_is_replaced(tmp_path: Path) -> None:
    shard, out, again = write_tar(tmp_path / "in.tar", members()), tmp_path / "out.tar", tmp_path / "again.tar"
    do([str(shard)], out)
    samples = read(out)
    wanted = {key: sample for key, sample in SAMPLES.items() if key != "no video"}
    assert samples.keys() == wanted.keys()
    for key, sample in wanted.items():
        brought = {"caption.json", "caption.txt"}
        assert {name: body for name, body in samples[key].items() if name not in brought} == sample
        assert samples[key].keys() >= brought
    do([str(out)], again)
    assert read(again).keys() == samples.keys()
    for key, sample in read(again).items():
        assert sample.keys() == samples[key].keys()
        assert sample["caption.txt"] == samples[key]["caption.txt"]
        assert json.loads(sample["caption.json"])["video"].startswith(f"{out}/")


def test_samples_that_share_a_key_are_told_apart_by_their_shard(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", [("000.mp4", b"%d" % number), (f"{number}{number}.mp4", b"own")])
    do([str(tmp_path)], tmp_path / "out.tar")
    above = str(tmp_path).lstrip("/")
    assert {key: sample["mp4"] for key, sample in read(tmp_path / "out.tar").items()} == {
        **{f"{above}/{number}.tar/000": b"%d" % number for number in range(3)},
        **{f"{number}{number}": b"own" for number in range(3)},
    }


def test_files_become_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, body in {"a/b.c.mp4": b"one", "a/é.WEBM": b"two", "a/bad.mkv": b"bad", "x": b"four"}.items():
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(body)
    do(["a", "x"], Path("out.tar"))
    samples = read(Path("out.tar"))
    assert {
        key: {name: body for name, body in sample.items() if name != "json"} for key, sample in samples.items()
    } == {
        "a/b_c": {"mp4": b"one", "txt": b"one"},
        "a/é": {"webm": b"two", "txt": b"two"},
        "a/bad": {"mkv": b"bad"},
        "x": {"video": b"four", "txt": b"four"},
    }
    assert json.loads(samples["a/bad"]["json"])["error"]["code"] == "bad"
    Path("a/b_c.mp4").write_bytes(b"clashes")
    with pytest.raises(UsageError, match=r"^a/b\.c\.mp4 and a/b_c\.mp4 would both be the sample a/b_c; give each"):
        do(["a"], Path("none.tar"))
    assert not Path("none.tar").exists()


def test_a_shard_ends_at_a_number_of_samples_and_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_tar(tmp_path / "in.tar", [(f"{number:03}.mp4", b"%04d" % number * 1000) for number in range(10)])
    monkeypatch.setattr(webdataset, "SHARD_SAMPLES", 4)
    do([str(shard)], tmp_path / "few" / "%d.tar")
    shards = [tmp_path / "few" / f"{number}.tar" for number in range(3)]
    assert [len(read(one)) for one in shards] == [4, 4, 2]
    monkeypatch.setattr(webdataset, "SHARD_BYTES", 10_000)
    do([str(shard)], tmp_path / "small" / "s-%02d.tar")
    small = sorted((tmp_path / "small").glob("*.tar"))
    assert [path.name for path in small] == [f"s-{number:02}.tar" for number in range(len(small))]
    assert max(path.stat().st_size for path in small) < 30_000
    assert read(*small).keys() == read(*shards).keys()
    do([str(shard)], tmp_path / "all.tar")
    assert len(read(tmp_path / "all.tar")) == 10


def test_shards_of_an_earlier_job_do_not_stay_beside_fewer_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_tar(tmp_path / "in.tar", [(f"{number:03}.mp4", b"clip") for number in range(5)])
    clips, out = inputs.clips([str(shard)]), tmp_path / "captions-%03d.tar"
    monkeypatch.setattr(webdataset, "SHARD_SAMPLES", 2)
    records = [{"video": clip.video, "caption": "a clip"} for clip in clips]
    assert len(webdataset.write(records, clips, out)) == 3
    (other := tmp_path / "captions-004.tar").touch()
    assert webdataset.write(records[:2], clips, out) == [tmp_path / "captions-000.tar"]
    assert sorted(tmp_path.glob("captions-*.tar")) == [tmp_path / "captions-000.tar", other]


def test_a_job_that_is_stopped_writes_its_shards_when_it_has_gone_on(tmp_path: Path) -> None:
    shard, out = (
        write_tar(tmp_path / "in.tar", [(f"{number}.mp4", b"%d" % number) for number in range(9)]),
        tmp_path / "out.tar",
    )

    def stopped(bodies: Iterable[tuple[str, bytes, Cut]], on_segments: OnSegments) -> KeyedRecords:
        for number, one in enumerate(echo(bodies, on_segments)):
            if number == 5:
                raise KeyboardInterrupt
            yield one

    clips = inputs.clips([str(shard)])
    with pytest.raises(KeyboardInterrupt):
        run.run(clips, run.of_bodies(stopped, 1000), out=out, format=FORMATS["webdataset"])
    assert not out.exists()
    do([str(shard)], out)
    assert {key: sample["txt"] for key, sample in read(out).items()} == {f"{n}": b"%d" % n for n in range(9)}
    assert (tmp_path / "out.tar.jsonl").read_bytes().count(b"\n") == 9


def test_files_of_macos_between_those_of_a_sample_do_not_part_them(tmp_path: Path) -> None:
    """Its tar puts ._NAME before each file that has attributes, as files from the web have."""
    mac, out = tmp_path / "in.tar", tmp_path / "out.tar"
    with_attributes = [
        (f"./{Path(name).parent}/{mark}{Path(name).name}", b"attributes" if mark else body)
        for name, body in members()
        for mark in ("._", "")
    ]
    write_tar(mac, with_attributes)
    write_tar(tmp_path / "linux.tar", members())
    skipped = inputs.Skipped()
    found = [clip.sample for clip in inputs.clips([str(mac)], skipped=skipped) if clip.sample]
    assert [(sample.name, sample.extensions) for sample in found] == [
        (clip.sample.name, clip.sample.extensions)
        for clip in inputs.clips([str(tmp_path / "linux.tar")])
        if clip.sample
    ]
    assert skipped.files.total() == 2 + len(members())
    do([str(mac)], out)
    do([str(tmp_path / "linux.tar")], tmp_path / "same.tar")
    carried, expected = read(out), read(tmp_path / "same.tar")
    assert {key: sample.keys() for key, sample in carried.items()} == {
        key: sample.keys() for key, sample in expected.items()
    }


def test_what_is_left_out_of_the_clips_is_left_out_of_the_shards(tmp_path: Path) -> None:
    shard = tmp_path / "in.tar"
    with tarfile.open(shard, "w") as tar:
        for name, kind in (("1.mp4", tarfile.REGTYPE), ("1.txt", tarfile.SYMTYPE), ("../1.key", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info)
    do([str(shard)], tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert {(info.name, info.isreg(), info.mode) for info in tar} == {
            (name, True, 0o644) for name in ("1.mp4", "1.json")
        }


def test_a_clip_that_cannot_be_carried_any_more_is_named(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"there")

    def removing(bodies: Iterable[tuple[str, bytes, Cut]], on_segments: OnSegments) -> Iterator[Any]:
        yield from echo(bodies, on_segments)
        clip.unlink()

    out = tmp_path / "out.tar"
    with pytest.raises(
        UsageError, match=rf"^cannot carry {clip} into the shards: No such file or directory; put it back"
    ):
        run.run(inputs.clips([str(clip)]), run.of_bodies(removing, 1000), out=out, format=FORMATS["webdataset"])
    assert not out.exists()


@pytest.mark.parametrize("out", ["in-%03d.tar", "in-000.tar", "in-%d.tar", "sub/../in-%03d.tar"])
def test_shards_never_replace_the_tars_that_they_are_made_of(tmp_path: Path, out: str) -> None:
    inputs_ = [tmp_path / f"in-{number:03}.tar" for number in range(2)]
    for number, tar in enumerate(inputs_):
        write_tar(tar, [(f"{number}.mp4", b"clip")])
    before = [tar.read_bytes() for tar in inputs_]
    (tmp_path / "sub").mkdir()
    with pytest.raises(UsageError, match=r"in-000.tar is read, and shards named in-.*\.tar would replace it"):
        do([str(inputs_[0])], tmp_path / out)
    assert [tar.read_bytes() for tar in inputs_] == before
    do([str(inputs_[0])], tmp_path / "out-%03d.tar")
    assert [tar.read_bytes() for tar in inputs_] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a-%d-%d.tar"], "a-%d-%d.tar names no shards; write one number into it, as in captions-%06d.tar"),
        (["--out", "a-%s.tar"], "a-%s.tar names no shards; write one number into it, as in captions-%06d.tar"),
        (["--format", "webdataset"], "webdataset writes shards: name them with --out, as in captions-%06d.tar"),
    ],
)
def test_a_name_that_cannot_be_is_refused_before_the_first_clip(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*CAPTION, str(REPOSITORY / "examples"), *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"etenet caption: {message}"
    assert list(tmp_path.iterdir()) == []
