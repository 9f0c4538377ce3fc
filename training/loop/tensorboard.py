"""The log of a run as TensorBoard shows it. The only file that knows that program, which is not a dependency."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from etenet.errors import UsageError

PACKAGE = "tensorboard"


class TensorBoard:
    """Writes steps and epochs into a folder, for `tensorboard --logdir`. Raises `UsageError` without the package."""

    def __init__(self, folder: Path, after_step: int) -> None:
        """`after_step`: what an earlier run wrote about later steps is not shown."""
        if find_spec(PACKAGE) is None:
            raise UsageError(f"--tensorboard needs the package {PACKAGE}: pip install {PACKAGE}, or leave it out")
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=after_step + 1)

    def step(self, line: Mapping[str, Any]) -> None:
        """A line of `log.jsonl` about a step."""
        self._add(line, ("loss", "learning_rate", "encoder_learning_rate", "gradient_norm"), line["step"])

    def epoch(self, line: Mapping[str, Any]) -> None:
        """A line about an epoch, with those of `speed.jsonl`."""
        names = ("train_loss", "validation_loss", "clips_per_s", "peak_memory_bytes")
        self._add(line | line["scores"], (*names, *line["scores"]), line["step"])

    def close(self) -> None:
        self._writer.close()

    def _add(self, line: Mapping[str, Any], names: tuple[str, ...], step: int) -> None:
        for name in names:
            if line.get(name) is not None:
                self._writer.add_scalar(name, line[name], step)
