"""The GPU benchmark, run in miniature on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.encoders import OURS, PEERS


@pytest.mark.long
def test_every_part_runs_dry(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    record = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert record == json.loads((tmp_path / "gpu.json").read_text())
    assert record["dry_run"]
    assert record["captions"]["equal_share"] == record["captions"]["alone_as_among_others_share"] == 1
    assert min(record["searching"].values()) > 0
    assert min(record["starting"].values()) > 0
    assert record["streaming"]["clips_per_s"] > 0
    assert record["working"]["by_workers"]["1"] == record["working"]["best"]
    assert record["working"]["best"]["best_batch"] == 2
    assert record["working"]["ratio_to_plain"] > 0
    assert record["encoding"]["feature_cosine"] > 0.999
    assert record["encoding"]["contenders"].keys() == {OURS, "ours, uncompiled", *PEERS}
    assert record["encoding"]["ratio_to_peers"].keys() == {*PEERS} - {"TensorRT"}
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_that_fails_is_recorded_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[str, float]:
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(gpu, "parts", lambda *_: {"working": broken, "chip": lambda: {"tflop_per_s": 1.0}})
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 1
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["working"] == {"failed": "RuntimeError: a kernel failed"}
    assert record["chip"] == {"tflop_per_s": 1.0}
