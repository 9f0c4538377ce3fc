"""The work that a Ray cluster gets."""

from __future__ import annotations

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
