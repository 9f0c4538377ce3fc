"""Benchmarks run in miniature, and end in one JSON line that says where and with what it was measured."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import decode, encoder, gpu, real_language, saturation, scale, search, server, training
from tests import clips


def test_the_training_benchmark_runs_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training.main(["--dry-run", "--out", str(tmp_path)])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "training.json").read_text()) == record
    assert record.keys() >= {"date", "commit", "machine", "versions"}
    assert min(record["stage_1"].values()) > 0
    assert [step["activation_checkpointing"] for step in record["steps"]] == [False, True]
    for step in record["steps"]:
        assert step["clips_per_s"] == pytest.approx(record["clips"] / step["seconds"])
        assert step["peak_memory_bytes"] > 0
        assert step["share_of_encoder"] > 0


SMALL = ["--encoder", "squeezenet1_1", "--rounds", "2"]


@pytest.fixture
def last_line(capfd: pytest.CaptureFixture[str]) -> Callable[[], Any]:
    return lambda: json.loads(capfd.readouterr().out.splitlines()[-1])


def test_the_decode_benchmark_finds_equal_frames(tmp_path: Path, last_line: Callable[[], Any]) -> None:
    for number in range(2):
        (tmp_path / f"{number}.mp4").write_bytes(clips.video(40 + number, bf="2"))
    (tmp_path / "not a clip.txt").write_bytes(b"text")
    decode.main(["--clips", str(tmp_path), "--long", str(tmp_path / "0.mp4"), "--out", str(tmp_path / "results")])
    record = last_line()
    assert record["clips"] == 2
    assert record["frames_equal"] is True
    assert record["ratio_to_torchcodec"] is None or record["ratio_to_torchcodec"] > 0  # it needs an FFmpeg installed
    assert record["ratio_to_decode_all"] > 0


def test_the_encoder_benchmark_compares_engines_that_agree(tmp_path: Path, last_line: Callable[[], Any]) -> None:
    encoder.main([*SMALL, "--crop-px", "64", "--out", str(tmp_path)])
    record = last_line()
    assert record["max_relative_error"] <= 1e-4
    assert record.keys() >= {"ratio_to_best_peer", "ratio_to_eager", "ratio_to_sgemm"}


def test_the_search_benchmark_finds_what_a_loop_finds(tmp_path: Path, last_line: Callable[[], Any]) -> None:
    search.main([*SMALL, "--words", "50", "--max-words", "4", "--out", str(tmp_path)])
    record = last_line()
    assert record["equal"] is True
    assert record.keys() >= {"share_of_encoder", "speedup_over_loop"}


def test_the_server_benchmark_asks_three_servers(tmp_path: Path, last_line: Callable[[], Any]) -> None:
    server.main([*SMALL, "--crop-px", "64", "--words", "50", "--seconds", "2", "--out", str(tmp_path)])
    record = last_line()
    assert len(record["throughput_per_s"]) == 3
    assert min(record["throughput_per_s"].values()) > 0
    assert record.keys() >= {"overhead_p50_ms", "throughput_share", "throughput_vs_plain", "p50_vs_plain", "ready_s"}


def test_the_saturation_benchmark_draws_a_curve(tmp_path: Path, last_line: Callable[[], Any]) -> None:
    short = ["--seconds", "2", "--shares", "0.5", "3", "--batch-sizes", "2"]
    saturation.main([*short, "--out", str(tmp_path)])
    record = last_line()
    calm, crowded = record["curve"]
    assert calm["refused_share"] == 0
    assert calm["p50"] <= calm["p99.9"] < crowded["p99.9"]
    assert record["batch_sizes"].keys() == {"2"}
    assert (tmp_path / "saturation.png").read_bytes().startswith(b"\x89PNG")


def test_the_scale_benchmark_counts_workers_and_memory(tmp_path: Path, last_line: Callable[[], Any]) -> None:
    small = ["--words", "50", "--vocabularies", "50", "--lengths-s", "4", "--sizes", "240p", "--seconds", "3"]
    scale.main([*SMALL, "--crop-px", "64", *small, "--out", str(tmp_path)])
    record = last_line()
    assert record.keys() >= {"decode_ms_by_length_s", "decode_ms_by_size", "search_ms_by_words"}
    for workers in ("1", "2"):
        assert record["workers"][workers]["clips_per_s"] > 0
        assert min(record["workers"][workers]["peak_mib"].values()) > 0


def test_videos_of_one_source_share_a_split() -> None:
    urls = [f"source {number}" for number in np.random.default_rng(0).integers(700, size=1000)]
    splits = real_language.splits_by_source(urls)
    assert Counter(splits) == real_language.SHARES
    splits_of = defaultdict(set)
    for url, split in zip(urls, splits, strict=True):
        splits_of[url].add(split)
    assert all(len(found) == 1 for found in splits_of.values())


def test_the_gpu_benchmark_runs_dry(tmp_path: Path, last_line: Callable[[], Any]) -> None:
    gpu.main(["--dry-run", "--out", str(tmp_path)])
    record = last_line()
    assert record["dry_run"]
    assert record["encoder"]["feature_cosine"] > 0.99
    assert record["captions"]["equal_share"] == 1
    assert all(value > 0 for value in record["beam_search"].values())
    assert record["stream"]["clips_per_s"] > 0
