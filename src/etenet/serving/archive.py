"""A checkpoint and the code that reads it -> one .mar, the same bytes every time.

A .mar is a zip with a manifest. It is written here rather than by torch-model-archiver, which stamps the time of day
into it; only what is compiled for a GPU, where that is asked for, may differ. The files of `handler/` are data to this
module; it never imports them. `SHA256SUMS`, in the format of sha256sum(1), lets whoever unpacks an archive see that it
is whole: the handler does, before it loads anything.
Only packaging needs torch, which takes seconds to import; a server starts without.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from etenet.errors import UsageError
from etenet.files import replacing, sha256

if TYPE_CHECKING:
    from etenet.model.checkpoint import Checkpoint

_log = logging.getLogger(__name__)

MODEL_NAME = "etenet"
MODEL_VERSION = "1.0"
HANDLER_FILE = "etenet_handler.py"
CONFIG_FILE = "model-config.yaml"
CHECKPOINT_FILE = "checkpoint.pt"
ENCODER_FILE = "encoder.xml"
GPU_KERNELS_FILE = "gpu_kernels.bin"
MANIFEST_FILE = "MAR-INF/MANIFEST.json"
SUMS_FILE = "SHA256SUMS"

_PACKAGE = Path(__file__).parent.parent
_EARLIEST_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def handler_folder() -> Path:
    """`handler/` of the source tree, or its copy inside an installed package."""
    for folder in (_PACKAGE.parent.parent / "handler", _PACKAGE / "handler"):
        if (folder / HANDLER_FILE).is_file():
            return folder
    raise UsageError("the handler/ folder is missing; install etenet from a complete source tree")


def package(checkpoint: Path, out: Path, *, gpu: bool = False) -> Path:
    """Write the archive atomically and return its path. The checkpoint is loaded once, so a bad one is not packaged.

    With `gpu` a worker on a GPU like that of this machine need not compile its encoder: `UsageError` without one.
    """
    from etenet.model import checkpoint as checkpoints

    loaded = checkpoints.load(checkpoint)
    handler = handler_folder()
    entries: dict[str, Path] = {
        CHECKPOINT_FILE: checkpoint,
        HANDLER_FILE: handler / HANDLER_FILE,
        CONFIG_FILE: handler / CONFIG_FILE,
        **dict(_package_files()),
    }
    contents = {MANIFEST_FILE: json.dumps(_manifest(), indent=2).encode()}
    contents |= {name: path.read_bytes() for name, path in sorted(entries.items())}
    contents |= _compiled_encoder(loaded)
    if gpu:
        contents[GPU_KERNELS_FILE] = _gpu_kernels(loaded)
    sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items())
    with replacing(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            _write(archive, name, content)
        _write(archive, SUMS_FILE, sums.encode())
    return out


def _compiled_encoder(checkpoint: Checkpoint) -> dict[str, bytes]:
    """What a worker on a CPU encodes with; nothing where OpenVINO is not to be had or cannot do it exactly."""
    try:
        from etenet.runtime.openvino import compile_encoder

        with tempfile.TemporaryDirectory() as folder:
            compile_encoder(checkpoint, Path(folder) / ENCODER_FILE)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    except (ImportError, RuntimeError) as error:
        _log.warning("the encoder is packaged as it is, and slower on a CPU: %s", error)
        return {}


def _gpu_kernels(checkpoint: Checkpoint) -> bytes:
    import torch

    from etenet.runtime.cuda import compiled_kernels

    if not torch.cuda.is_available():
        raise UsageError(
            "there is no GPU here to compile for; package on a machine with a GPU like the one that serves"
        )
    try:
        return compiled_kernels(checkpoint.encoder, checkpoint.preprocessing, device=torch.device("cuda"))
    except RuntimeError as error:
        raise UsageError(f"the encoder cannot be compiled for this GPU: {error}") from error


def unpack(archive: Path, folder: Path) -> None:
    """Raises `UsageError` where the archive is missing or no archive."""
    try:
        with zipfile.ZipFile(archive) as contents:
            contents.extractall(folder)
    except FileNotFoundError as error:
        raise UsageError(
            f"no archive at {archive}; make it with: etenet package CHECKPOINT, or give --checkpoint"
        ) from error
    except zipfile.BadZipFile as error:
        raise UsageError(f"{archive} is damaged or no archive ({error}); package it again") from error


def verify(unpacked: Path) -> None:
    """Raises `UsageError` where an unpacked archive does not hold what was packaged."""
    try:
        lines = (unpacked / SUMS_FILE).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{SUMS_FILE} of the archive cannot be read; package it again") from error
    sums = {name: promised for promised, _, name in (line.partition("  ") for line in lines)}
    names = dict.fromkeys((MANIFEST_FILE, CHECKPOINT_FILE, HANDLER_FILE, CONFIG_FILE, *sums))
    with ThreadPoolExecutor() as threads:
        found = threads.map(_sha256, (unpacked / name for name in names))
        for name, actual in zip(names, found, strict=True):
            if actual is None or actual != sums.get(name):
                raise UsageError(f"{name} of the archive is damaged or missing; package it again")


def configuration(unpacked: Path) -> dict[str, Any]:
    """What an archive tells TorchServe and the handler; nothing where that is damaged, which `verify` tells."""
    try:
        found = yaml.safe_load((unpacked / CONFIG_FILE).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def configure(unpacked: Path, settings: Mapping[str, object]) -> None:
    """Put other values there; what is damaged is left so."""
    config, sums = unpacked / CONFIG_FILE, unpacked / SUMS_FILE
    before = f"{_sha256(config)}  {CONFIG_FILE}\n"
    if sums.is_file() and before in (lines := sums.read_text(errors="replace")):
        config.write_text(yaml.safe_dump(configuration(unpacked) | dict(settings)))
        sums.write_text(lines.replace(before, f"{_sha256(config)}  {CONFIG_FILE}\n"))


def _sha256(path: Path) -> str | None:
    try:
        return sha256(path)
    except OSError:
        return None


def _package_files() -> Iterator[tuple[str, Path]]:
    for path in _PACKAGE.rglob("*"):
        inside = path.relative_to(_PACKAGE)
        if path.is_file() and "__pycache__" not in inside.parts and inside.parts[0] != "handler":
            yield f"{_PACKAGE.name}/{inside.as_posix()}", path


def _manifest() -> dict[str, object]:
    return {
        "createdOn": "01/01/1980 00:00:00",  # TorchServe wants a time; a true one would change the bytes
        "runtime": "python",
        "model": {
            "modelName": MODEL_NAME,
            "modelVersion": MODEL_VERSION,
            "handler": HANDLER_FILE,
            "serializedFile": CHECKPOINT_FILE,
            "configFile": CONFIG_FILE,
        },
        "archiverVersion": "0.12.0",
    }


def _write(archive: zipfile.ZipFile, name: str, contents: bytes) -> None:
    entry = zipfile.ZipInfo(name, _EARLIEST_ZIP_DATE)
    entry.external_attr = 0o644 << 16
    entry.create_system = 3
    archive.writestr(entry, contents)
