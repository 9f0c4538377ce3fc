"""How many frames are encoded at a time is measured once for a network and a processor, and changes no caption."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from etenet.captioning.captioner import Captioner
from etenet.runtime import openvino, streams
from etenet.serving import archive
from tests.conftest import DEMO

PROCESSOR = "a processor"


class Machine:
    """Encodes a clip in so many seconds of its own clock with each number of streams."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> None:
        self.now_s, self._seconds, self.tried = 0.0, seconds, list[int]()
        monkeypatch.setattr(streams.time, "perf_counter", lambda: self.now_s)

    def prepare(self, number: int) -> Callable[[], object]:
        self.tried.append(number)

        def encode() -> None:
            self.now_s += self._seconds[number]

        return encode


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "encoder.xml"
    path.write_text("<net/>")
    return path


def test_the_fastest_number_of_streams_is_kept(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, {16: 4.0, 8: 2.0, 4: 1.0, 2: 3.0, 1: 5.0})
    assert streams.streams(graph, 64, PROCESSOR) == 16
    streams.measure(graph, 64, PROCESSOR, machine.prepare)
    assert machine.tried == [16, 8, 4, 2, 1]
    assert streams.streams(graph, 64, PROCESSOR) == 4


def test_a_small_difference_changes_nothing(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams.measure(graph, 2, PROCESSOR, Machine(monkeypatch, {2: 1.0, 1: 0.97}).prepare)
    assert streams.streams(graph, 2, PROCESSOR) == 2


def test_what_was_measured_holds_for_that_network_and_machine_only(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams.measure(graph, 2, PROCESSOR, Machine(monkeypatch, {2: 2.0, 1: 1.0}).prepare)
    assert streams.streams(graph, 2, PROCESSOR) == 1
    assert streams.streams(graph, 3, PROCESSOR) == 3
    assert streams.streams(graph, 2, "another processor") == 2
    graph.write_text("<another/>")
    assert streams.streams(graph, 2, PROCESSOR) == 2


@pytest.mark.parametrize("contents", ["", "many", "0", "-1", "3"])
def test_a_damaged_file_counts_for_nothing(contents: str, graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams.measure(graph, 2, PROCESSOR, Machine(monkeypatch, {2: 2.0, 1: 1.0}).prepare)
    (kept,) = (Path(os.environ["XDG_CACHE_HOME"]) / "etenet" / "streams").iterdir()
    kept.write_text(contents)
    assert streams.streams(graph, 2, PROCESSOR) == 2


def test_where_nothing_can_be_kept_the_default_holds(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    streams.measure(graph, 2, PROCESSOR, Machine(monkeypatch, {2: 2.0, 1: 1.0}).prepare)
    assert streams.streams(graph, 2, PROCESSOR) == 2


@pytest.mark.usefixtures("no_home")
def test_without_a_home_the_default_holds(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams.measure(graph, 2, PROCESSOR, Machine(monkeypatch, {2: 2.0, 1: 1.0}).prepare)
    assert streams.streams(graph, 2, PROCESSOR) == 2


def test_packaging_measures_this_machine(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etenet.runtime.load.cores", lambda: 4)
    archive.package(DEMO, tmp_path / "demo.mar")
    (kept,) = (cache / "etenet" / "streams").iterdir()
    assert kept.read_text() in ("1", "2", "4")


def test_an_error_of_one_frame_is_not_that_of_later_ones(graph: Path) -> None:
    """The graph reshapes eight numbers to as many rows as the largest byte of a frame says."""
    frame, first = ops.parameter([1, 2, 2, 3], np.uint8), ops.constant(np.array([0]))
    rows = ops.unsqueeze(ops.convert(ops.reduce_max(frame, [0, 1, 2, 3], False), "i64"), first)
    table = ops.reshape(ops.constant(np.ones(8, np.float32)), ops.concat([rows, ops.constant(np.array([2]))], 0), False)
    sums, zeros = ops.reduce_sum(table, first, True), ops.constant(np.zeros((1, 2), np.float32))
    ov.save_model(ov.Model([ops.scatter_update(zeros, first, sums, ops.constant(np.array(0)))], [frame]), graph)
    encode, frames = openvino.CompiledEncoder(graph, threads=2), np.full((4, 2, 2, 3), 4, np.uint8)
    with pytest.raises(RuntimeError):
        encode(frames - 1)
    with pytest.raises(RuntimeError):  # else `renew` would not be needed
        encode(frames)
    encode.renew()
    np.testing.assert_array_equal(encode(frames), np.full((4, 2), 4))


def test_features_do_not_depend_on_the_streams(captioner: Captioner, tmp_path: Path) -> None:
    openvino.compile_encoder(captioner.checkpoint, path := tmp_path / "encoder.xml")
    encoders = [openvino.CompiledEncoder(path, threads=4, at_a_time=number) for number in (4, 2, 1)]
    size_px = captioner.checkpoint.preprocessing.resize_px
    frames = np.random.default_rng(0).integers(0, 256, (16, size_px, size_px, 3), dtype=np.uint8)
    first, *others = [encode(frames) for encode in encoders]
    assert encoders[0].frame_shape == frames.shape[1:]
    for features in others:
        np.testing.assert_allclose(features, first, atol=1e-5 * np.abs(first).max())
