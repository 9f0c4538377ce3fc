"""Benchmarks run in miniature, and end in one JSON line that says where and with what it was measured."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from benchmarks import real_language, training


def test_the_training_benchmark_runs_dry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training.main(["--dry-run", "--out", str(tmp_path)])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "training.json").read_text()) == record
    assert record.keys() >= {"date", "commit", "machine", "versions"}
    assert [step["activation_checkpointing"] for step in record["steps"]] == [False, True]
    for step in record["steps"]:
        assert step["clips_per_s"] == pytest.approx(record["clips"] / step["seconds"])
        assert step["peak_memory_bytes"] > 0


def test_videos_of_one_source_share_a_split() -> None:
    urls = [f"source {number}" for number in np.random.default_rng(0).integers(700, size=1000)]
    splits = real_language.splits_by_source(urls)
    assert Counter(splits) == real_language.SHARES
    splits_of = defaultdict(set)
    for url, split in zip(urls, splits, strict=True):
        splits_of[url].add(split)
    assert all(len(found) == 1 for found in splits_of.values())
