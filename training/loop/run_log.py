"""The log of a run: `log.jsonl`, `speed.jsonl`, and a progress bar on a terminal.

`log.jsonl` has one object per step and per epoch. It holds nothing that differs from run to run, so a run that was
killed and resumed leaves the same bytes. Times and memory go to `speed.jsonl`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from training.loop.memory import peak_bytes


class RunLog:
    """Writes in the first process only."""

    def __init__(self, folder: Path, *, title: str, clips: int, device: torch.device, silent: bool) -> None:
        self._log, self._speed = folder / "log.jsonl", folder / "speed.jsonl"
        self._silent, self._device = silent, device
        self._bar = tqdm(total=clips, desc=title, unit="clip", disable=True if silent else None)
        self._epoch_started, self._epoch_clips = time.monotonic(), 0

    def continue_from(self, log_bytes: int, clips: int) -> None:
        """Cut the log to its length in the snapshot that the run continues from: for a new run, to nothing."""
        if not self._silent:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as log:
                log.truncate(log_bytes)
        self._bar.update(clips)

    def flushed_bytes(self) -> int:
        """Flush the log to the disk and return its length."""
        with self._log.open("ab") as log:
            os.fsync(log.fileno())
            return log.tell()

    def step(self, clips: int, **line: Any) -> None:
        self._write(self._log, {"kind": "step", **line})
        self._epoch_clips += clips
        self._bar.update(clips)
        self._bar.set_postfix(epoch=line["epoch"], loss=f"{line['loss']:.2f}")

    def epoch(self, waited_s: float, **line: Any) -> None:
        self._write(self._log, {"kind": "epoch", **line})
        seconds = time.monotonic() - self._epoch_started
        speed = {
            "stage": line["stage"],
            "epoch": line["epoch"],
            "seconds": round(seconds, 3),
            "clips_per_s": round(self._epoch_clips / seconds, 3),
            "waited_for_data_s": round(waited_s, 3),
            "peak_memory_bytes": peak_bytes(self._device),
        }
        self._write(self._speed, speed)
        self._epoch_started, self._epoch_clips = time.monotonic(), 0
        if not self._silent:
            with tqdm.external_write_mode(file=sys.stderr):
                print(json.dumps({**line, **speed}), file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()

    def _write(self, file: Path, line: dict[str, Any]) -> None:
        if not self._silent:
            with file.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
