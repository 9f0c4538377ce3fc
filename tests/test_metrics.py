"""Figures of workers with damaged files: the other files count, and each damaged one is named once."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import values

from etenet import metrics
from handler.draining_handler import DrainingHandler


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a worker that captioned 7 clips and works on 2."""
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(tmp_path))
    value_of = values.MultiProcessValue(lambda: os.getpid())
    value_of("counter", "etenet_captions", "etenet_captions_total", (), (), "h").inc(7)
    value_of("gauge", "etenet_requests_in_progress", "etenet_requests_in_progress", (), (), "h", "livesum").inc(2)
    return tmp_path


def figures_of(folder: Path) -> tuple[float, float, bool]:
    shown = metrics.exposition(folder, ready=True)
    captions, in_progress = metrics.totals(folder, metrics.CAPTIONS, metrics.IN_PROGRESS)
    return captions, in_progress, b"\netenet_captions_total 7.0\n" in shown and b"\netenet_ready 1.0\n" in shown


@pytest.mark.parametrize("allocate", [metrics.allocate, lambda: DrainingHandler().initialize(None)])
def test_allocated_files_have_no_holes(folder: Path, allocate: Callable[[], None]) -> None:
    """A worker that writes to a hole ends once the disk is full."""
    files = [path for path in folder.iterdir() if path.stat().st_blocks * 512 < path.stat().st_size]
    before = {path: path.read_bytes() for path in files}
    allocate()
    assert len(files) == 2
    assert all(path.stat().st_blocks * 512 >= path.stat().st_size for path in files)
    assert {path: path.read_bytes() for path in files} == before


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "without its last byte": lambda whole: whole[: struct.unpack_from("i", whole)[0] - 1],
    "50 bytes of it": lambda whole: whole[:50],
    "3 bytes of it": lambda whole: whole[:3],
    "100 other bytes": lambda _: bytes(range(100, 200)),
    "text": lambda _: b"no space left on device\n",
    "no JSON inside": lambda whole: whole.replace(b'["etenet', b"[[etenet"),
    "no UTF-8 inside": lambda whole: whole.replace(b"etenet", b"\xff\xfe\xfdnet"),
}


@pytest.mark.parametrize(
    "name", ["counter_1.db", "histogram_1.db", f"gauge_livesum_{os.getppid()}.db", "gauge.db", "x.db"]
)
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_costs_no_figure_of_other_files(
    folder: Path, kind: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = folder / name
    damaged.write_bytes(DAMAGE[kind]((folder / f"counter_{os.getpid()}.db").read_bytes()))
    assert figures_of(folder) == figures_of(folder) == (7, 2, True)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(f"{damaged} is damaged")


def test_a_file_that_a_worker_has_just_made_is_not_called_damaged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "counter_1.db").write_bytes(b"")
    assert figures_of(folder) == (7, 2, True)
    assert not caplog.records


def test_odd_names_and_a_missing_folder_are_no_error(folder: Path) -> None:
    (folder / "gauge_livesum_first.db").write_bytes(b"")
    (folder / "folder.db").mkdir()
    assert figures_of(folder) == (7, 2, True)
    assert metrics.totals(folder / "none", metrics.CAPTIONS) == [0]
