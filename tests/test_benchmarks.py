"""Benchmarks run in miniature. Each ends with one JSON line that names machine, versions and commit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import etenet
from benchmarks import capacity, decode, encoder, neighbours, saturation, scale, search, server, training
from benchmarks.rig import chip, servers
from tests import clips


@pytest.mark.long
def test_the_training_benchmark_runs_dry_and_makes_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.main(["--dry-run", "--out", str(tmp_path), "--keep", str(tmp_path / "kept")]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "training.json").read_text()) == record
    assert record.keys() >= {"date", "commit", "machine", "versions", "dry_run"}
    assert min(record["stage_1"].values()) > 0
    ways = [(row["micro_batch"], row["activation_checkpointing"], row["compiled"]) for row in record["steps"]]
    assert ways[:4] == [(1, False, False), (2, False, False), (1, True, False), (2, True, False)]
    assert [way[1:] for way in ways[4:]] == [(False, True), (True, True)]
    for row in record["steps"]:
        assert row["clips_per_s"] == pytest.approx(record["clips"] / row["seconds"])
        bound = record["ceilings"]["tflop_per_s"] / (3 * record["clip_tflop"])  # clips per second
        assert row["share_of_bound"] == pytest.approx(row["clips_per_s"] / bound)
        assert 0 <= row["waited_for_data_share"] < 1
        assert min(row["peak_memory_bytes"], row["share_of_encoder"]) > 0
    made = record["full_size"]
    assert made["processes"] == 2
    assert made["seconds"].keys() == {"prepare", "stills", "stage 1", "stage 2", "evaluate"}
    assert made["test"]["small demo"]["thing right %"] > 50
    assert made["test"]["full size"].keys() == made["test"]["small demo"].keys() >= {"CIDEr", "all right %"}
    assert [(line["stage"], line["epoch"]) for line in made["epochs"]] == [(1, 1), (2, 1)]
    assert all(0 <= line["waited_for_data_s"] < line["seconds"] for line in made["epochs"])
    assert etenet.load(tmp_path / "kept" / "demo-full.pt").encoder == "squeezenet1_1"


class Bench:
    """A stand-in for `training.Bench` that has memory for eight clips, and fails with 64."""

    workload = training.TrainingWorkload()

    def __init__(self) -> None:
        self.compiled = 0

    def trainee(self, stage: int, *, checkpointing: bool, compiled: bool = False) -> SimpleNamespace:
        assert (stage, checkpointing in (False, True)) == (2, True)
        self.compiled += compiled
        return SimpleNamespace(compiled=SimpleNamespace(works=True, compile_s=60.0))

    def step(self, _: object, micro_batch: int) -> dict[str, float]:
        if micro_batch == 64:
            raise ValueError("a kernel is missing")
        if micro_batch > 8:
            raise torch.OutOfMemoryError("full")
        return {"clips_per_s": 100.0}


def test_steps_that_do_not_fit_into_memory_are_recorded_and_the_others_measured() -> None:
    rows = training.eager_rows(Bench())
    assert [row["micro_batch"] for row in rows] == [8, 16, 32, 64] * 2
    assert [row.get("out_of_memory", False) for row in rows] == [False, True, True, False] * 2
    assert [row.get("failed") for row in rows] == [None, None, None, "ValueError: a kernel is missing"] * 2
    assert training.best_of(rows)["micro_batch"] == 8


@pytest.mark.parametrize(("left", "compiled"), [([True, True], 2), ([True, False], 1), ([False, False], 0)])
def test_nothing_is_compiled_without_time(left: list[bool], compiled: int) -> None:
    bench, time_is_left = Bench(), iter(left)
    rows = training.compiled_rows(bench, 8, lambda: next(time_is_left))
    assert bench.compiled == compiled
    assert ["left_out" in row for row in rows] == [not is_left for is_left in left]
    assert all(row["compile_s"] == 60 for row in rows[:compiled])


def test_a_server_that_ends_at_its_start_is_not_waited_for(tmp_path: Path) -> None:
    began_s = time.monotonic()
    with pytest.raises(RuntimeError, match="its server ended"):
        servers._started("http://127.0.0.1:1", b"", tmp_path, "no_such_module").__enter__()
    assert time.monotonic() - began_s < servers.START_DEADLINE_S / 3


def test_the_ceilings_of_a_chip_are_measured() -> None:
    assert min(chip.ceilings(64, 1, torch.device("cpu")).values()) > 0


SMALL = ["--encoder", "squeezenet1_1", "--rounds", "2"]


@pytest.fixture
def last_line(capfd: pytest.CaptureFixture[str]) -> Callable[[], Any]:
    return lambda: json.loads(capfd.readouterr().out.splitlines()[-1])


def test_the_decode_benchmark_finds_equal_frames(tmp_path: Path, last_line: Callable[[], Any]) -> None:
    bodies = clips.video(40, bf="2"), clips.video(41, bf="0", g="10"), clips.video(20, moments=range(0, 500, 25))
    for number, body in enumerate(bodies):
        (tmp_path / f"{number}.mp4").write_bytes(body)
    (tmp_path / "not a clip.txt").write_bytes(b"text")
    decode.main(["--clips", str(tmp_path), "--long", str(tmp_path / "0.mp4"), "--out", str(tmp_path / "results")])
    record = last_line()
    assert record["clips"] == 3
    assert {kind: of_kind["clips"] for kind, of_kind in record["by_kind"].items()} == dict.fromkeys(
        (decode.NO_B_FRAMES, decode.SLOW, decode.OTHERS), 1
    )
    assert record["frames_equal"] is True
    for of_kind in (record, *record["by_kind"].values()):
        times = [*of_kind["one_thread"]["median_cpu_ms"].values(), *of_kind["two_threads"]["median_ms"].values()]
        assert min(times) > 0
    assert record["ratio_to_torchcodec"] is None or record["ratio_to_torchcodec"] > 0  # torchcodec needs FFmpeg
    assert record["ratio_to_decode_all"] > 0


def test_the_encoder_benchmark_compares_engines_whose_features_agree(
    tmp_path: Path, last_line: Callable[[], Any]
) -> None:
    encoder.main([*SMALL, "--crop-px", "64", "--out", str(tmp_path)])
    record = last_line()
    assert record["max_relative_error"] <= 1e-4
    assert record.keys() >= {"ratio_to_best_peer", "ratio_to_eager", "ratio_to_sgemm"}


def test_the_search_benchmark_finds_the_sentences_of_the_loop(tmp_path: Path, last_line: Callable[[], Any]) -> None:
    search.main([*SMALL, "--words", "50", "--max-words", "4", "--out", str(tmp_path)])
    record = last_line()
    assert record["equal"] is True
    assert record.keys() >= {"share_of_encoder", "speedup_over_loop"}


@pytest.mark.long
def test_the_server_benchmark_measures_three_servers(tmp_path: Path, last_line: Callable[[], Any]) -> None:
    server.main([*SMALL, "--crop-px", "64", "--words", "50", "--seconds", "2", "--out", str(tmp_path)])
    record = last_line()
    assert len(record["throughput_per_s"]) == 3
    assert min(record["throughput_per_s"].values()) > 0
    assert record.keys() >= {"overhead_p50_ms", "throughput_share", "throughput_vs_plain", "p50_vs_plain", "ready_s"}


@pytest.mark.long
def test_the_saturation_benchmark_draws_a_curve(tmp_path: Path, last_line: Callable[[], Any]) -> None:
    short = ["--seconds", "2", "--shares", "0.5", "3", "--batch-sizes", "2"]
    saturation.main([*short, "--out", str(tmp_path)])
    record = last_line()
    calm, crowded = record["curve"]
    assert calm["refused_share"] == 0
    assert calm["p50"] <= calm["p99.9"] < crowded["p99.9"]
    assert record["batch_sizes"].keys() == {"2"}
    assert (tmp_path / "saturation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_the_scale_benchmark_counts_workers_and_memory(tmp_path: Path, last_line: Callable[[], Any]) -> None:
    small = ["--words", "50", "--vocabularies", "50", "--lengths-s", "4", "--sizes", "240p", "--seconds", "3"]
    scale.main([*SMALL, "--crop-px", "64", *small, "--out", str(tmp_path)])
    record = last_line()
    assert record.keys() >= {"decode_ms_by_length_s", "decode_ms_by_size", "search_ms_by_words"}
    for workers in ("1", "2"):
        assert record["workers"][workers]["clips_per_s"] > 0
        assert min(record["workers"][workers]["peak_mib"].values()) > 0


@pytest.mark.long
def test_a_caption_on_a_shared_machine_takes_at_most_five_times_as_long(
    tmp_path: Path, last_line: Callable[[], Any]
) -> None:
    neighbours.main(["--rounds", "3", "--captions", "10", "--out", str(tmp_path)])
    record = last_line()
    for shared in (record["beside_a_busy_loop_per_core"], record["with_half_the_cores"] or record["alone"]):
        assert 0 < shared["p50_ms"] <= 5 * record["alone"]["p50_ms"]
        assert shared["captions_per_processor_s"] > 0


@pytest.mark.long
def test_the_capacity_of_a_network_is_reckoned_from_its_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = tmp_path / "clips" / "moving.mp4"
    clip.parent.mkdir()
    clip.write_bytes(clips.video())
    command = ["--clips", str(clip.parent), "--networks", "demo.pt", "--rounds", "1", "--price", "0.1"]
    capacity.main([*command, "--out", str(tmp_path)])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    of_demo = record["networks"]["demo.pt"]
    for form, encode in (("float32", "encode"), ("int8", "encode in int8")):
        clip_ms = sum(of_demo["cpu_ms"][part] for part in ("decode", encode, "search"))
        assert of_demo["core_hours_per_million"][form] == pytest.approx(clip_ms / 3.6, rel=0.01)
        assert of_demo["dollars_per_million"][form] == pytest.approx(clip_ms / 36, rel=0.01)
