"""Snapshots to resume a run from: a crash, a full disk or a flipped bit costs at most the newest one.

A file's name holds the step and the SHA-256 of its bytes. The newest two stay. Knows nothing of the contents.
"""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import torch

from etenet.errors import UsageError
from etenet.files import replacing

MAX_SNAPSHOTS = 2


def save(contents: dict[str, Any], folder: Path, step: int) -> Path:
    """Write a snapshot and delete all but the newest. Raises `UsageError` if it cannot; then older ones stay."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    body = buffer.getvalue()
    path = folder / f"step-{step:08d}-{_digest(body)}.pt"
    try:
        with replacing(path) as file:
            file.write(body)
    except OSError as error:
        raise UsageError(
            f"cannot save to {folder} ({error.strerror}); earlier snapshots are whole: "
            "free some space and continue with --resume"
        ) from error
    for old in _newest_first(folder)[MAX_SNAPSHOTS:]:
        old.unlink()
    return path


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest snapshot that is whole, or None if none was written. Raises `UsageError` if all are damaged.

    Deletes files that a crash left unfinished.
    """
    for unfinished in folder.glob(".step-*"):
        unfinished.unlink()
    snapshots = _newest_first(folder)
    for path in snapshots:
        body = path.read_bytes()
        if path.stem.endswith(f"-{_digest(body)}"):
            contents: dict[str, Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
            return contents
        print(f"{path} is damaged (its SHA-256 begins with {_digest(body)}); trying the one before it", file=sys.stderr)
    if snapshots:
        raise UsageError(f"all snapshots in {folder} are damaged; train again into another folder (--out)")
    return None


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)
