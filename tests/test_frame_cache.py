"""Frames reach their rows from all cores, whatever single clips do, and a second run damages nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from etenet.errors import UsageError
from etenet.video.sampling import sample_frames
from tests.clips import audio_only, spoil, video
from training.data import frame_cache
from training.data.frame_cache import CacheLog, Failure, Job, fill, shape_of_clips

SIZE_PX = 24


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(5):
        (folder / f"{number}.mp4").write_bytes(video(20 + number))
    return sorted(folder.iterdir())


def test_every_row_holds_the_frames_of_its_clip_and_bad_clips_leave_theirs_empty(
    clips: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "sound.mp4").write_bytes(audio_only())
    (tmp_path / "cut.mp4").write_bytes(clips[0].read_bytes()[:300])
    bad = [tmp_path / name for name in ("sound.mp4", "cut.mp4", "gone.mp4")]
    jobs = [Job(row, file) for row, file in enumerate([*clips, *bad])]
    out = tmp_path / "out"
    with CacheLog(out, {}) as log:
        failures = fill(out, jobs, log, shape_of_clips(9, SIZE_PX))
        assert log.done.keys() == set(range(5))
    assert {row: failure.code for row, failure in failures.items()} == {
        5: "not_a_video",
        6: "undecodable_video",
        7: "unreadable_file",
    }
    frames = np.load(out / "frames.npy")
    assert frames.shape == (9, 16, SIZE_PX, SIZE_PX, 3)
    for row, file in enumerate(clips):
        np.testing.assert_array_equal(frames[row], sample_frames(file.read_bytes(), resize_px=SIZE_PX).frames)
    assert not frames[5:].any()


def test_a_clip_that_crashes_its_process_costs_its_neighbours_nothing(clips: list[Path], tmp_path: Path) -> None:
    jobs = [Job(row, file) for row, file in enumerate(clips)]
    jobs.insert(2, Job(7, tmp_path / "deadly.mp4", render=partial(os._exit, 3)))
    with CacheLog(tmp_path / "out", {}) as log:
        failures = fill(tmp_path / "out", jobs, log, shape_of_clips(8, SIZE_PX))
        assert log.done.keys() == set(range(5))
    assert {row: failure.code for row, failure in failures.items()} == {7: "decoder_crashed"}
    assert np.load(tmp_path / "out" / "frames.npy")[:5].any(axis=(1, 2, 3, 4)).all()


def test_our_own_bug_costs_one_clip(clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(frame_cache, "sample_frames", broken)
    outcome = frame_cache._store(Job(0, clips[0]), cache=tmp_path / "frames.npy", resize_px=SIZE_PX)
    assert outcome == Failure("internal_error", "ZeroDivisionError: by zero")


def test_rows_that_are_done_are_not_written_again_and_others_are_tried_again(clips: list[Path], tmp_path: Path) -> None:
    done, late, out = tmp_path / "done.mp4", tmp_path / "late.mp4", tmp_path / "out"
    shutil.copyfile(clips[0], done)
    jobs = [Job(0, done), Job(1, late)]
    with CacheLog(out, {}) as log:
        assert fill(out, jobs, log, shape_of_clips(2, SIZE_PX)).keys() == {1}
    spoil(done)
    shutil.copyfile(clips[1], late)
    with CacheLog(out, {}) as log:
        assert fill(out, jobs, log, shape_of_clips(2, SIZE_PX)) == {}
    assert_frames_of(out, clips[:2])


def test_a_row_whose_file_has_changed_is_written_again(clips: list[Path], tmp_path: Path) -> None:
    files, out = [tmp_path / f"{number}.mp4" for number in range(4)], tmp_path / "out"
    jobs = [Job(row, file) for row, file in enumerate(files)]
    for file in files:
        shutil.copyfile(clips[0], file)
    with CacheLog(out, {}) as log:
        fill(out, jobs, log, shape_of_clips(4, SIZE_PX))
        shutil.copyfile(clips[1], files[0])
        shutil.copyfile(clips[2], tmp_path / "other.mp4")
        jobs[1] = Job(1, tmp_path / "other.mp4")
        files[2].write_bytes(b"no video")
        files[3].unlink()
        failures = fill(out, jobs, log, shape_of_clips(4, SIZE_PX))
        assert {row: failure.code for row, failure in failures.items()} == {2: "not_a_video", 3: "unreadable_file"}
    assert_frames_of(out, [clips[1], clips[2], clips[0], clips[0]])
    spoil(files[0])
    with CacheLog(out, {}) as log:
        assert fill(out, jobs[:2], log, shape_of_clips(4, SIZE_PX)) == {}


def test_a_log_without_files_is_believed(clips: list[Path], tmp_path: Path) -> None:
    """As older versions wrote it."""
    jobs = [Job(0, clips[0])]
    with CacheLog(tmp_path, {}) as log:
        fill(tmp_path, jobs, log, shape_of_clips(1, SIZE_PX))
    (tmp_path / "progress.jsonl").write_text('{}\n{"row": 0}\n')
    with CacheLog(tmp_path, {}) as log:
        assert fill(tmp_path, [Job(0, clips[1])], log, shape_of_clips(1, SIZE_PX)) == {}
    assert_frames_of(tmp_path, clips[:1])


def assert_frames_of(out: Path, files: list[Path]) -> None:
    for cached, file in zip(np.load(out / "frames.npy"), files, strict=True):
        np.testing.assert_array_equal(cached, sample_frames(file.read_bytes(), resize_px=SIZE_PX).frames)


def test_a_folder_begun_with_something_else_is_refused(tmp_path: Path) -> None:
    with CacheLog(tmp_path, {"resize_px": 24, "clips": "a"}):
        pass
    with CacheLog(tmp_path, {"resize_px": 24, "clips": "a"}) as log:
        log.note(3, {})
    with pytest.raises(UsageError, match="begun with resize_px = 24, now it is 32; name another folder or empty this"):
        CacheLog(tmp_path, {"resize_px": 32, "clips": "a"})
    with pytest.raises(UsageError, match="begun with seed = None, now it is 1"):
        CacheLog(tmp_path, {"resize_px": 24, "clips": "a", "seed": 1})
    with CacheLog(tmp_path, {"resize_px": 24, "clips": "a"}) as log:
        assert log.done.keys() == {3}


def test_a_folder_with_other_files_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UsageError, match="has other files; name an empty folder"):
        CacheLog(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UsageError, match=r"cannot write to .*thesis"):
        CacheLog(tmp_path / "thesis.txt", {})


def test_two_runs_on_one_folder_are_refused(tmp_path: Path) -> None:
    with CacheLog(tmp_path, {}), pytest.raises(UsageError, match="another run is preparing"):
        CacheLog(tmp_path, {})
    with CacheLog(tmp_path, {}):
        pass


@pytest.mark.parametrize("torn", [b"", b'{"ro', b'{"row": 1'])
def test_half_a_line_counts_as_not_written(tmp_path: Path, torn: bytes) -> None:
    with CacheLog(tmp_path, {"a": 1}) as log:
        log.note(0, {})
    with (tmp_path / "progress.jsonl").open("ab") as file:
        file.write(torn)
    with CacheLog(tmp_path, {"a": 1}) as log:
        assert log.done.keys() == {0}
        log.note(2, {})
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert lines == [{"a": 1}, {"row": 0}, {"row": 2}]


def test_a_log_with_only_half_a_line_begins_again(tmp_path: Path) -> None:
    (tmp_path / "progress.jsonl").write_bytes(b'{"resize_px"')
    with CacheLog(tmp_path, {"a": 1}) as log:
        assert not log.done
    assert (tmp_path / "progress.jsonl").read_text() == '{"a": 1}\n'


def test_a_damaged_log_and_missing_frames_are_named(clips: list[Path], tmp_path: Path) -> None:
    with CacheLog(tmp_path, {}) as log:
        log.note(0, {})
        with pytest.raises(UsageError, match=r"progress.jsonl has rows, but the frames are gone; empty"):
            fill(tmp_path, [Job(0, clips[0])], log, shape_of_clips(1, SIZE_PX))
    (tmp_path / "progress.jsonl").write_text("{}\n{}\n")
    with pytest.raises(UsageError, match=r"progress.jsonl is damaged; empty"):
        CacheLog(tmp_path, {})


def test_frames_that_do_not_fit_on_the_disk_are_not_begun(
    clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free=16 * SIZE_PX**2 * 3))
    with CacheLog(tmp_path / "out", {}) as log:
        jobs = [Job(row, file) for row, file in enumerate(clips)]
        with pytest.raises(UsageError, match=r"the frames need 0.0 GB and .* has 0.0 GB free; make room"):
            fill(tmp_path / "out", jobs, log, shape_of_clips(5, SIZE_PX))
        assert fill(tmp_path / "out", jobs[:1], log, shape_of_clips(5, SIZE_PX)) == {}
