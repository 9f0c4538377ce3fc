"""How frames are laid out on the cores is measured once for a network and a processor, and changes no caption."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

from etenet.captioning.captioner import Captioner
from etenet.runtime import layout, openvino
from etenet.runtime.layout import Layout
from etenet.serving import archive
from tests.conftest import DEMO

PROCESSOR = "a processor"
SLOW = {(streams, frames): 9.0 for streams in (1, 2, 4) for frames in (1, 2, 4)}


class Machine:
    """Encodes a clip in so many seconds of its own clock with each layout."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Mapping[tuple[int, int], float]) -> None:
        self.now_s, self._seconds, self.tried = 0.0, seconds, list[tuple[int, int]]()
        monkeypatch.setattr(layout.time, "perf_counter", lambda: self.now_s)

    def prepare(self, laid_out: Layout) -> Callable[[], object]:
        key = (laid_out.streams, laid_out.frames)
        self.tried.append(key)

        def encode() -> None:
            self.now_s += self._seconds[key]

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


def encoder_size(captioner: Captioner) -> int:
    return captioner.checkpoint.preprocessing.resize_px


def found(graph: Path, threads: int, processor: str = PROCESSOR) -> tuple[int, int]:
    laid_out = layout.layout(graph, threads, processor)
    return laid_out.streams, laid_out.frames


@pytest.mark.parametrize(
    ("threads", "default"), [(1, (1, 4)), (2, (2, 4)), (4, (4, 4)), (6, (6, 2)), (16, (16, 1)), (64, (16, 1))]
)
def test_by_default_a_clip_has_work_for_all_cores(graph: Path, threads: int, default: tuple[int, int]) -> None:
    assert found(graph, threads) == default


def test_the_fastest_layout_is_kept(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, {(16, 1): 4.0, (8, 1): 2.0, (4, 1): 1.0, (2, 1): 3.0, (1, 1): 5.0})
    layout.measure(graph, 64, PROCESSOR, machine.prepare)
    assert list(dict.fromkeys(machine.tried)) == [(16, 1), (8, 1), (4, 1), (2, 1), (1, 1)]
    assert found(graph, 64) == (4, 1)
    layout.measure(graph, 4, PROCESSOR, Machine(monkeypatch, SLOW | {(2, 4): 2.0, (2, 2): 1.0}).prepare)
    assert found(graph, 4) == (2, 2)


def test_a_small_difference_changes_nothing(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.measure(graph, 2, PROCESSOR, Machine(monkeypatch, SLOW | {(2, 4): 1.0, (1, 4): 0.97, (2, 2): 0.96}).prepare)
    assert found(graph, 2) == (2, 4)


def test_what_was_measured_holds_for_that_network_and_machine_only(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout.measure(graph, 2, PROCESSOR, Machine(monkeypatch, SLOW | {(1, 4): 1.0}).prepare)
    assert found(graph, 2) == (1, 4)
    assert found(graph, 3) == (3, 4)
    assert found(graph, 2, "another processor") == (2, 4)
    graph.write_text("<another/>")
    assert found(graph, 2) == (2, 4)


@pytest.mark.parametrize("contents", ["", "many", "1", "0 1", "-1 1", "3 1", "1 0", "1 5", "1 1 1"])
def test_a_damaged_file_counts_for_nothing(contents: str, graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.measure(graph, 2, PROCESSOR, Machine(monkeypatch, SLOW | {(1, 4): 1.0}).prepare)
    (kept,) = (Path(os.environ["XDG_CACHE_HOME"]) / "etenet" / "layouts").iterdir()
    kept.write_text(contents)
    assert found(graph, 2) == (2, 4)


def test_where_nothing_can_be_kept_the_default_holds(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    layout.measure(graph, 2, PROCESSOR, Machine(monkeypatch, SLOW | {(1, 4): 1.0}).prepare)
    assert found(graph, 2) == (2, 4)


@pytest.mark.usefixtures("no_home")
def test_without_a_home_the_default_holds(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.measure(graph, 2, PROCESSOR, Machine(monkeypatch, SLOW | {(1, 4): 1.0}).prepare)
    assert found(graph, 2) == (2, 4)


def test_packaging_measures_this_machine(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etenet.serving.archive.cores", lambda: 4)
    archive.package(DEMO, tmp_path / "demo.mar")
    (kept,) = (cache / "etenet" / "layouts").iterdir()
    assert kept.read_text() in {f"{streams} {frames}" for streams in (1, 2, 4) for frames in (1, 2, 4)}


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


def test_features_do_not_depend_on_the_layout(captioner: Captioner, tmp_path: Path) -> None:
    openvino.compile_encoder(captioner.checkpoint, path := tmp_path / "encoder.xml")
    layouts = [Layout(4, 1), Layout(2, 2), Layout(1, 4), Layout(4, 4)]
    encoders = [openvino.CompiledEncoder(path, threads=4, laid_out=laid_out) for laid_out in layouts]
    size_px = encoder_size(captioner)
    frames = np.random.default_rng(0).integers(0, 256, (16, size_px, size_px, 3), dtype=np.uint8)
    first, *others = [encode(frames) for encode in encoders]
    assert encoders[0].frame_shape == frames.shape[1:]
    for features in others:
        np.testing.assert_allclose(features, first, atol=1e-5 * np.abs(first).max())


@pytest.mark.parametrize("count", [1, 3, 4, 5, 15])
def test_a_frame_has_the_same_features_wherever_it_comes(captioner: Captioner, tmp_path: Path, count: int) -> None:
    """To the bit: in a request that is not full, and beside other frames."""
    openvino.compile_encoder(captioner.checkpoint, path := tmp_path / "encoder.xml")
    encode, size_px = openvino.CompiledEncoder(path, threads=2, laid_out=Layout(2, 4)), encoder_size(captioner)
    frames = np.random.default_rng(0).integers(0, 256, (16, size_px, size_px, 3), dtype=np.uint8)
    np.testing.assert_array_equal(encode(frames[::-1][:count]), encode(frames)[::-1][:count])


def test_a_graph_for_one_frame_is_computed_frame_by_frame(captioner: Captioner, tmp_path: Path) -> None:
    """As archives have it that were packaged when every graph was one."""
    openvino.compile_encoder(captioner.checkpoint, path := tmp_path / "encoder.xml")
    model = openvino.core().read_model(path)
    openvino.for_frames(model, 1)
    openvino.save(model, tmp_path / "one.xml")
    frames = np.zeros((3, size_px := encoder_size(captioner), size_px, 3), np.uint8)
    features = [openvino.CompiledEncoder(graph, threads=2)(frames) for graph in (path, tmp_path / "one.xml")]
    np.testing.assert_allclose(*features, atol=1e-5 * np.abs(features[0]).max())
