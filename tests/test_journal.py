"""A journal knows what made its records: no two checkpoints or settings get mixed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from etenet.cli import main
from etenet.errors import UsageError
from etenet.files import sha256
from etenet.jobs import run
from etenet.jobs.formats import format_for
from etenet.jobs.inputs import JobClip, id_of
from etenet.jobs.journal import Job, Journal, Record
from etenet.jobs.progress import Summary
from etenet.jobs.run import OnSegments
from tests import clips
from tests.conftest import CAPTION, DEMO, REAL, REPOSITORY

CLIPS = [JobClip(name, name) for name in "abcdef"]
JOB = Job(checkpoint=f"sha256:{'1' * 64}", settings={"beam_size": "3"})


def names(clips: Iterable[JobClip], _on_segments: OnSegments) -> Iterator[Record]:
    """An engine that captions a clip with its name. The second of them fails."""
    for clip in clips:
        failed = {"error": {"code": "bad", "message": "bad"}} if clip.video == "b" else {"caption": clip.path}
        yield {"video": clip.video, **failed}


def do(clips: list[JobClip], out: Path, job: Job | None = JOB, **how: Any) -> Summary:
    return run.run(clips, names, out=out, format=format_for(None, out), job=job, **how)


def lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_the_first_line_says_what_made_the_records_and_every_line_is_a_clip(tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    for some, how in ((CLIPS[2:], {}), (CLIPS, {"in_order": True}), (CLIPS, {"retry_failed": True}), (CLIPS, {})):
        do(some, out, **how)
        first, *rest = lines(out)
        assert first["job"] == {"checkpoint": JOB.checkpoint, "settings": {"beam_size": "3"}}
        assert not any("job" in line for line in rest)
        assert all(line.keys() & {"caption", "error"} for line in lines(out))
    assert sorted(line["video"] for line in lines(out)) == [clip.video for clip in CLIPS]


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (Job(checkpoint=JOB.checkpoint, settings={}), r"beam_size 3 \(now default\)"),
        (
            Job(checkpoint=JOB.checkpoint, settings={"beam_size": "4", "max_words": "9"}),
            r"beam_size 3 \(now 4\), max_words default \(now 9\)",
        ),
        (
            Job(checkpoint=f"sha256:{'2' * 64}", settings=JOB.settings),
            r"checkpoint sha256:111111111111 \(now sha256:222222222222\)",
        ),
    ],
)
@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv"])
def test_another_job_is_refused_and_may_overwrite(name: str, other: Job, difference: str, tmp_path: Path) -> None:
    out = tmp_path / name
    journal = out if name.endswith(".jsonl") else tmp_path / f"{name}.jsonl"
    do(CLIPS[:3], out)
    before = journal.read_bytes()
    with pytest.raises(UsageError, match=f"was made with {difference}; name another .* --overwrite$"):
        do(CLIPS, out, other)
    assert journal.read_bytes() == before
    assert do(CLIPS, out, other, overwrite=True).before == 0
    assert lines(journal)[0]["job"] == other.as_dict()
    assert do(CLIPS, out, other).total == 0


def test_a_journal_of_an_older_version_goes_on_and_this_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "captions.jsonl"
    old = os.fsdecode(b"caf\xe9.mp4")
    out.write_text(json.dumps({"video": old, "caption": "old"}) + "\n" + '{"video": "b", "error": {"code": "bad"}}\n')
    clips = [*CLIPS, JobClip(id_of(old), old)]
    assert do(clips, out, about="...").before == 2
    assert "captions.jsonl does not say with what checkpoint and settings" in capsys.readouterr().err
    assert not any("job" in line for line in lines(out))
    with Journal(out) as journal:
        assert [record["caption"] for record in journal.records() if record["video"] == id_of(old)] == ["old"]
    out.write_text('{"video": "b", "error": {"code": "bad", "message": "bad"}}\n')
    do(CLIPS, out, retry_failed=True)
    assert lines(out)[0]["job"] == JOB.as_dict()


def test_only_a_journal_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "precious.jsonl"
    for text in ("hello\n", '{"video": "a", "caption": "b", "job": 5}\n'):
        out.write_text(text)
        with pytest.raises(UsageError, match=r"precious\.jsonl, line 1.*name another file"):
            do(CLIPS, out)
        assert out.read_text() == text
    out.write_text("hello\n")
    with pytest.raises(UsageError, match="was not written by this command"):
        do(CLIPS, out, overwrite=True)
    assert out.read_text() == "hello\n"


def test_the_command_refuses_to_mix_checkpoints_and_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, out = tmp_path / "clip.mp4", tmp_path / "captions.csv"
    clip.write_bytes(clips.video(5))
    job = [str(clip), "--out", str(out)]
    assert main([*CAPTION, *job]) == 0
    (first,) = lines(tmp_path / "captions.csv.jsonl")
    assert first["job"] == {"checkpoint": f"sha256:{sha256(DEMO)}", "settings": {}}
    before = out.read_bytes()
    capsys.readouterr()
    for other in (
        [*CAPTION, *job, "--beam-size", "2"],
        [*CAPTION, *job, "--probabilities"],
        [*CAPTION, *job, "--segment-s", "2"],
        ["caption", *job, "--checkpoint", str(REAL)],
    ):
        assert main(other) == 2
        printed = capsys.readouterr()
        assert (printed.err.count("\n"), printed.out) == (1, "")
        assert f"captions.csv.jsonl was made with {'checkpoint' if str(REAL) in other else ''}" in printed.err
    assert out.read_bytes() == before
    assert main([*CAPTION, *job]) == 0
    assert "1 clip, 1 of them done before; nothing to do" in capsys.readouterr().err
    assert main([*CAPTION, *job, "--captions", "2", "--overwrite"]) == 0
    assert out.read_bytes() != before
