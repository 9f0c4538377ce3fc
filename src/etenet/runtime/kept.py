"""Encoders compiled for a CPU, kept from one job to the next: to compile one takes seconds, and imports torch."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from etenet.files import cache_folder, replacing, sha256
from etenet.model import checkpoint as checkpoints
from etenet.runtime.load import compiled_encoder

MOST_KEPT = 8

GRAPH = "encoder.xml"


@contextmanager
def kept_encoder(checkpoint: Path, before_compiling: Callable[[], None] = lambda: None) -> Iterator[Path | None]:
    """The compiled encoder of a checkpoint, which is compiled if it was not kept. It may be gone after the block.

    `before_compiling` can tell the user why nothing happens for a while. None if it cannot be compiled, and the log
    says why. Raises `CheckpointError`.
    """
    digest = checkpoints.load_arrays(checkpoint).id.removeprefix("sha256:")
    kept, is_there = None, False
    with suppress(OSError):  # no home, or one that cannot be used
        kept = cache_folder() / "encoders" / f"{digest}-{_compiler()}"
        if is_there := (kept / GRAPH).exists():
            os.utime(kept)
    if kept and is_there:
        yield kept / GRAPH
        return
    before_compiling()
    if files := compiled_encoder(checkpoints.load(checkpoint), GRAPH):
        with tempfile.TemporaryDirectory() as folder:
            yield _written(files, kept, Path(folder)) / GRAPH
    else:
        yield None


def _compiler() -> str:
    """What compiles, and how."""
    try:
        version = metadata.version("openvino")
    except metadata.PackageNotFoundError:
        return "none"
    return f"openvino-{version}-{sha256(Path(__file__).with_name('openvino.py'))[:8]}"


def _written(files: dict[str, bytes], kept: Path | None, otherwise: Path) -> Path:
    """The folder that has the files now: `kept`, or `otherwise` without a home that can be written and has room."""
    if kept:
        with suppress(OSError):
            _write(files, kept)
            _drop_oldest(kept.parent)
            return kept
    _write(files, otherwise)
    return otherwise


def _write(files: dict[str, bytes], folder: Path) -> None:
    """The graph last: where it is, its weights are."""
    for name in sorted(files):
        with replacing(folder / name) as file:
            file.write(files[name])


def _drop_oldest(folder: Path) -> None:
    newest_first = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest_first[MOST_KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
