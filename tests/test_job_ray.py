"""The work that a Ray cluster gets, and the end of a job on it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from etenet.jobs.engines.ray import without_copies
from etenet.video.segments import WHOLE, Cut


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
