"""The work that a Ray cluster gets, and the end of a job on it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest

from etenet.captioning.stream import JOB_DECODE_TRIES
from etenet.jobs.engines import ray
from etenet.jobs.engines.ray import without_copies
from etenet.sandbox.pool import InProcess
from etenet.video.clip import Clip
from etenet.video.limits import DecodeLimits
from etenet.video.segments import WHOLE, Cut
from tests import clips


def test_files_with_the_same_bytes_are_captioned_once(tmp_path: Path) -> None:
    files = {"a": b"one", "b": b"one", "c": b"two", "d": b"three", "empty": b"", "also empty": b""}
    for name, body in files.items():
        (tmp_path / name).write_bytes(body)
    part, read = Cut(start_s=1.0), []

    def digests(paths: list[str]) -> dict[str, str]:
        read.extend(paths)
        return {path: Path(path).read_text() for path in paths}

    sources = {(f"{tmp_path}/{name}", cut): [name] for name in [*files, "not there"] for cut in (WHOLE, part)}
    expected = [["a", "b"], ["c"], ["d"], ["empty"], ["also empty"], ["not there"]]
    distinct = without_copies(sources, digests)
    for cut in (WHOLE, part):
        assert [names for (_, of), names in distinct.items() if of == cut] == expected
    assert [Path(path).name for path in read] == ["a", "b", "c"]


@pytest.mark.parametrize("held_up", [JOB_DECODE_TRIES - 1, JOB_DECODE_TRIES])
def test_a_clip_is_decoded_again_where_the_machine_was_too_busy(
    held_up: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip.mp4").write_bytes(clips.video(20))
    left, outside = [held_up], InProcess(resize_px=32)

    class Busy:
        def submit(self, body: bytes, cut: Cut) -> Future[list[Clip]]:
            left[0] -= 1
            if left[0] < 0:
                return outside.submit(body, cut)
            future: Future[list[Clip]] = Future()
            future.set_exception(DecodeLimits().held_up(0.5))
            return future

    monkeypatch.setattr(ray, "_decoders", lambda _: Busy())
    row = {"clip": 0, "source": pickle.dumps((str(tmp_path / "clip.mp4"), WHOLE))}
    (part,) = ray._decoded(row, resize_px=32)
    decoded = pickle.loads(part["decoded"])
    if held_up < JOB_DECODE_TRIES:
        assert decoded[0].info.codec == "h264"
    else:
        assert decoded["error"]["code"] == "overloaded"


def test_ctrl_c_leaves_no_time_for_ray_to_crash() -> None:
    """What Ray does at the end of one in three processes, an exit handler does here always."""
    code = """
import atexit, os, sys, types
from etenet import cli

def interrupted(options):
    raise KeyboardInterrupt

cli.caption, sys.modules["ray"] = interrupted, types.ModuleType("ray")
atexit.register(os.abort)
cli.main(["caption", "x.mp4"])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "etenet caption: stopped\n")
