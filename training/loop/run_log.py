"""The log of a run: `log.jsonl`, `speed.jsonl`, lines on standard error, and TensorBoard's files if asked for.

`log.jsonl` has one object per step and per epoch. It holds nothing that differs from run to run, so a run that was
killed and resumed leaves the same bytes. Times and memory go to `speed.jsonl`.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from etenet.errors import UsageError
from training.loop.memory import peak_bytes
from training.loop.tensorboard import TensorBoard
from training.progress import Progress, duration, say


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other run can train in this folder meanwhile. Raises `UsageError` if one does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.jsonl").open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another run is training in {folder}; wait until it ends, or choose another --out"
            ) from error
        yield


class RunLog:
    """Writes in the first process only: the others are `silent`."""

    def __init__(
        self, folder: Path, *, device: torch.device, silent: bool, log_bytes: int, board: TensorBoard | None = None
    ) -> None:
        """Cuts the log to its length in the snapshot that the run continues from: for a new run, to nothing."""
        self._log, self._speed = folder / "log.jsonl", folder / "speed.jsonl"
        self._silent, self._device, self._board = silent, device, board
        self._progress: Progress | None = None
        self._epoch_started, self._epoch_clips = time.monotonic(), 0
        if not silent:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as log:
                log.truncate(log_bytes)

    def show(self, progress: Progress) -> None:
        """Where steps and epochs are shown from now on."""
        self._progress, self._epoch_started = progress, time.monotonic()

    def flushed_bytes(self) -> int:
        """Flush the log to the disk and return its length."""
        with self._log.open("ab") as log:
            os.fsync(log.fileno())
            return log.tell()

    def step(self, clips: int, **line: Any) -> None:
        self._write(self._log, {"kind": "step", **line})
        self._epoch_clips += clips
        if self._board:
            self._board.step(line)
        if self._progress:
            self._progress.update(clips, f"epoch {line['epoch']}, step {line['step']}, loss {line['loss']:.2f}")

    def epoch(self, waited_s: float, epochs: int, **line: Any) -> None:
        """An epoch of `epochs`. Epoch 0 is the validation of what the stage starts from: it has no speed."""
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
        if line["epoch"]:
            self._write(self._speed, speed)
        self._epoch_started, self._epoch_clips = time.monotonic(), 0
        if self._board:
            self._board.epoch(line | speed)
        if not self._silent:
            say(_summary(line, epochs, seconds))

    def close(self) -> None:
        if self._progress:
            self._progress.close()
        if self._board:
            self._board.close()

    def _write(self, file: Path, line: dict[str, Any]) -> None:
        if not self._silent:
            with file.open("a") as lines:
                lines.write(json.dumps(line) + "\n")


def _summary(line: dict[str, Any], epochs: int, seconds: float) -> str:
    which = f"epoch {line['epoch']} of {epochs}" if line["epoch"] else "its start"
    loss = "" if line["train_loss"] is None else f"loss {line['train_loss']:.2f}, "
    scores = ", ".join(f"{name} {score:.3f}" for name, score in line["scores"].items())
    best = ", the best so far" if line["best"] else ""
    validation = f"validation loss {line['validation_loss']:.2f}, {scores}"
    return f"stage {line['stage']}, {which}: {loss}{validation}, {duration(seconds)}{best}"
