"""Encoders compiled for a CPU, kept for later jobs and archives: to compile one takes seconds, and imports torch."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

from etenet.files import cache_folder, replacing, sha256
from etenet.model import checkpoint as checkpoints
from etenet.model.seal import seal, sha256_of_whole
from etenet.runtime import GRAPH
from etenet.runtime.load import compiled_encoder

MOST_KEPT = 8


@contextmanager
def kept_encoder(checkpoint: Path, before_compiling: Callable[[], None] = lambda: None) -> Iterator[Path | None]:
    """The compiled encoder of a checkpoint, alone in a folder until the block ends. It is compiled if it was not kept.

    `before_compiling` can tell the user why nothing happens for a while. None if it cannot be compiled, and the log
    says why. Raises `CheckpointError`.
    """
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / GRAPH
        if not _unpacked(checkpoints.inspect(checkpoint).id, graph.parent):
            before_compiling()
            loaded = checkpoints.load(checkpoint)  # it may have been replaced meanwhile
            files = compiled_encoder(loaded)
            for name, contents in files.items():
                (graph.parent / name).write_bytes(contents)
            if not files:
                yield None
                return
            _keep(files, loaded.id)
        yield graph


def _unpacked(checkpoint_id: str, folder: Path) -> bool:
    """Whether the encoder was kept, and is whole. Then it is in the folder."""
    with suppress(OSError, ValueError, zipfile.BadZipFile):
        kept = _file(checkpoint_id)
        sha256_of_whole(kept)
        with zipfile.ZipFile(kept) as files:
            files.extractall(folder)
        os.utime(kept)
        return True
    return False


def _keep(files: Mapping[str, bytes], checkpoint_id: str) -> None:
    """As far as there is a home that can be written and has room."""
    with suppress(OSError), replacing(_file(checkpoint_id)) as kept:
        with zipfile.ZipFile(kept, "w") as archive:
            for name, contents in files.items():
                archive.writestr(name, contents)
        seal(kept)
    with suppress(OSError):
        _drop_oldest(_file(checkpoint_id).parent)


def _file(checkpoint_id: str) -> Path:
    return cache_folder() / "encoders" / f"{checkpoint_id.removeprefix('sha256:')}-{_compiler()}.zip"


def _compiler() -> str:
    """What compiles, and how."""
    try:
        version = metadata.version("openvino")
    except metadata.PackageNotFoundError:
        return "none"
    return f"openvino-{version}-{sha256(Path(__file__).with_name('openvino.py'))[:8]}"


def _drop_oldest(folder: Path) -> None:
    newest_first = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest_first[MOST_KEPT:]:
        path.unlink()
