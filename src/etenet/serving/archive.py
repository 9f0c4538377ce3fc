"""A checkpoint and the code that reads it -> one .mar, the same bytes every time.

A .mar is a zip with a manifest. torch-model-archiver is not used, because it puts the time of day into the archive.
Only the part that is compiled for a GPU, with `gpu`, may differ. The files of `handler/` are data to this module, which
never imports them. The archive is sealed. `SHA256SUMS`, in the format of sha256sum(1), shows that an unpacked one is
whole, too: the launcher checks it before anything of the archive runs, the handler before it loads the checkpoint. Only
compiling imports torch, which takes seconds; a server starts without it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from etenet.assets import SHARE, bundled
from etenet.errors import UsageError, named
from etenet.files import replacing, sha256
from etenet.linux import cores
from etenet.model.seal import seal, sha256_of_whole
from etenet.runtime import GRAPH, PACKAGED
from etenet.serving.properties import meant
from etenet.video.limits import DecodeLimits

if TYPE_CHECKING:
    from etenet.model.checkpoint import Checkpoint

Quantise: TypeAlias = "Callable[[Checkpoint, Path], None]"
"""Replaces the compiled graph of a checkpoint by one in int8. Raises `UsageError` if that harms the captions."""

MODEL_NAME = "etenet"
MODEL_VERSION = "1.0"  # of the archive, in every response; not the version of this package
HANDLER_FILE = "etenet_handler.py"
CONFIG_FILE = "model-config.yaml"
CHECKPOINT_FILE = "checkpoint.pt"
ENCODER_FILE = GRAPH
GPU_KERNELS_FILE = "gpu_kernels.bin"
MANIFEST_FILE = "MAR-INF/MANIFEST.json"
ABOUT_FILE = "about.json"
SUMS_FILE = "SHA256SUMS"

_SETTINGS: Mapping[str, Any] = {  # of CONFIG_FILE, with examples; TorchServe has further ones
    **{"minWorkers": 1, "maxWorkers": 1, "batchSize": 8, "maxBatchDelay": 1, "responseTimeout": 120},
    **{"startupTimeout": 600, "precision": PACKAGED, "gpu": {"workers": 1, "batchSize": 16}},
    "etenet": {**asdict(DecodeLimits()), "feature_cache_bytes": 2**28},
}

# Where TorchServe would take another value without a word, or wait for a worker that it never starts.
_LEAST = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 1, "maxBatchDelay": 0, "responseTimeout": 1}
_LEAST |= {"startupTimeout": 1, "workers": 1}

_PACKAGE = Path(__file__).parent.parent
_EARLIEST_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def package(
    checkpoint: Path,
    out: Path,
    *,
    gpu: bool = False,
    quantise: Quantise | None = None,
    before_compiling: Callable[[], None] = lambda: None,
) -> Path:
    """Write the archive atomically and return its path. Raises `CheckpointError` for a checkpoint that does not load.

    With `gpu` the archive carries the encoder compiled for GPUs like this machine's; `UsageError` if there is none.
    With `quantise` workers on a CPU encode in int8. `before_compiling` can tell the user why nothing happens.
    """
    from etenet.model import checkpoint as checkpoints

    inspected = checkpoints.inspect(checkpoint)
    handler = bundled("handler")
    _check_settings(handler / CONFIG_FILE)
    entries: dict[str, Path] = {
        CHECKPOINT_FILE: checkpoint,
        HANDLER_FILE: handler / HANDLER_FILE,
        CONFIG_FILE: handler / CONFIG_FILE,
        **dict(_package_files()),
    }
    listed = manifest(version=MODEL_VERSION, handler=HANDLER_FILE)
    contents = {MANIFEST_FILE: json.dumps(listed, indent=2).encode()}
    contents |= {name: path.read_bytes() for name, path in sorted(entries.items())}
    described = About(
        name=inspected.name,
        encoder=inspected.encoder_name,
        precision="int8" if quantise else "float32",
        terms=inspected.terms,
    )
    contents[ABOUT_FILE] = json.dumps(asdict(described), indent=2).encode()
    contents |= _encoder(checkpoint, quantise, before_compiling)
    if gpu:
        contents[GPU_KERNELS_FILE] = _gpu_kernels(checkpoints.load(checkpoint))
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    if not inspected.id == f"sha256:{digests[CHECKPOINT_FILE]}" == f"sha256:{sha256(checkpoint)}":
        raise UsageError(f"{checkpoint} was replaced while it was packaged; package it again")
    sums = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    with replacing(out) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, content in contents.items():
                _write(archive, name, content)
            _write(archive, SUMS_FILE, sums.encode())
        seal(file)
    return out


def _encoder(checkpoint: Path, quantise: Quantise | None, before_compiling: Callable[[], None]) -> dict[str, bytes]:
    """The files of the encoder compiled for a CPU, in int8 with `quantise`.

    This machine keeps those in float32, and how it computes these fastest. No files, and the log says why, if the
    encoder cannot be compiled; with `quantise` that is a `UsageError`.
    """
    from etenet.model import checkpoint as checkpoints
    from etenet.runtime.kept import kept_encoder

    with kept_encoder(checkpoint, before_compiling) as graph:
        if not graph:
            if quantise:
                raise UsageError("the encoder cannot be compiled, and so not quantised; the warning says why")
            return {}
        if quantise:
            quantise(checkpoints.load(checkpoint), graph)
        with suppress(ImportError, RuntimeError):  # of an OpenVINO that has broken; a worker says so
            from etenet.runtime.openvino import measure_layout

            measure_layout(graph, cores())
        return {path.name: path.read_bytes() for path in sorted(graph.parent.iterdir())}


def _gpu_kernels(checkpoint: Checkpoint) -> bytes:
    import torch

    from etenet.runtime.cuda import compiled_kernels
    from etenet.video.clip import FRAMES_PER_CLIP

    if not torch.cuda.is_available():
        raise UsageError(
            "this machine has no GPU to compile for; package on a machine with a GPU like the one that serves"
        )
    try:
        return compiled_kernels(
            checkpoint.encoder,
            checkpoint.preprocessing,
            frames_per_clip=FRAMES_PER_CLIP,
            device=torch.device("cuda"),
        )
    except RuntimeError as error:
        raise UsageError(f"the encoder cannot be compiled for this GPU: {error}") from error


def unpack(archive: Path, folder: Path) -> None:
    """Raises `UsageError` unless the archive is there, whole, and holds what was packaged and nothing else."""
    if not archive.is_file():
        raise UsageError(f"no archive at {archive}; make it with: etenet package CHECKPOINT, or give --checkpoint")
    try:
        sha256_of_whole(archive)
        with zipfile.ZipFile(archive) as contents:
            names = contents.namelist()
            contents.extractall(folder)
    except OSError as error:
        raise UsageError(f"{archive} cannot be unpacked to {folder}: {error}; fix that, and start again") from error
    except Exception as error:  # zipfile raises anything for a damaged directory
        raise UsageError(f"{archive} is damaged or not an archive ({error}); package it again") from error
    if SUMS_FILE not in names:
        raise UsageError(f"{archive} was not made by etenet package: it has no {SUMS_FILE}; package its checkpoint")
    verify(folder)
    if strangers := set(names) - _sums(folder).keys() - {SUMS_FILE}:
        raise UsageError(f"{archive} was changed ({named(sorted(strangers))} came later); package it again")


@contextmanager
def opened(path: Path) -> Iterator[tuple[Path, Path | None]]:
    """The checkpoint in an archive and its compiled encoder, if it has one; any other file is a checkpoint itself.

    Raises `UsageError` as `unpack` does.
    """
    if path.suffix != ".mar":
        yield path, None
        return
    with tempfile.TemporaryDirectory() as folder:
        unpack(path, Path(folder))
        graph = Path(folder) / ENCODER_FILE
        yield Path(folder) / CHECKPOINT_FILE, graph if graph.exists() else None


def verify(unpacked: Path) -> None:
    """Raises `UsageError` if a file of an unpacked archive is not as it was packaged."""
    sums = _sums(unpacked)
    names = dict.fromkeys((MANIFEST_FILE, CHECKPOINT_FILE, HANDLER_FILE, CONFIG_FILE, *sums))
    with ThreadPoolExecutor() as threads:
        hashes = threads.map(_sha256, (unpacked / name for name in names))
        for name, actual in zip(names, hashes, strict=True):
            if actual is None or actual != sums.get(name):
                raise UsageError(f"{name} of the archive is damaged or missing; package it again")


def _sums(unpacked: Path) -> dict[str, str]:
    try:
        lines = (unpacked / SUMS_FILE).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{SUMS_FILE} of the archive cannot be read; package it again") from error
    return {name: expected for expected, _, name in (line.partition("  ") for line in lines)}


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """Which model an archive holds, in what precision, and under what terms it may be used. Older archives say less."""

    name: str = ""
    encoder: str = "an unknown encoder"
    precision: str = "float32"  # of the encoder's graph for a CPU
    terms: str = ""

    def __str__(self) -> str:
        encoder = self.encoder if self.precision == "float32" else f"{self.encoder} in {self.precision}"
        return f"{self.name or 'a model without a name'} ({encoder}); terms: {self.terms or 'not stated'}"


def about(unpacked: Path) -> About:
    try:
        return About(**json.loads((unpacked / ABOUT_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return About()


def _check_settings(path: Path) -> None:
    """Raises `UsageError` if the file is no YAML, or a value or a name in it would be misread or ignored."""
    try:
        settings = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    _compare(path, "", settings, _SETTINGS)
    require_workers(path, settings)


def require_workers(where: Path | str, settings: Mapping[str, Any]) -> None:
    """Raises `UsageError` for numbers with which TorchServe would start no worker, or other ones than these."""
    for name, value in (*settings.items(), *(settings.get("gpu") or {}).items()):
        if name in _LEAST and value < _LEAST[name]:
            raise UsageError(f"{where}: {name} must be at least {_LEAST[name]}, got {value}")
    least, most = (settings.get(name, 1) for name in ("minWorkers", "maxWorkers"))
    if least > most:
        raise UsageError(f"{where}: minWorkers must be at most maxWorkers, which is {most}, got {least}")


def _compare(path: Path, group: str, settings: Any, examples: Mapping[str, Any]) -> None:
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: {group or 'the file'} must have lines like batchSize: 8, got {settings!r}")
    for name, value in settings.items():
        if other := meant(str(name), examples):
            raise UsageError(f"{path}: no setting is called {name}; write {other}, or leave it out")
        if isinstance(example := examples.get(name, value), dict):
            _compare(path, name, value, example)
        elif type(value) is not type(example) and (type(value), type(example)) != (int, float):
            raise UsageError(f"{path}: {name} must be a value like {example}, got {value!r}")


def configuration(unpacked: Path) -> dict[str, Any]:
    """The archive's settings for TorchServe and the handler; empty if they are damaged, which `verify` reports."""
    try:
        settings = yaml.safe_load((unpacked / CONFIG_FILE).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def configure(unpacked: Path, settings: Mapping[str, object]) -> None:
    """Change settings of an unpacked archive. Damaged settings are left as they are."""
    config, sums = unpacked / CONFIG_FILE, unpacked / SUMS_FILE
    before = f"{_sha256(config)}  {CONFIG_FILE}\n"
    if sums.is_file() and before in (lines := sums.read_text(errors="replace")):
        config.write_text(yaml.safe_dump(configuration(unpacked) | dict(settings)))
        sums.write_text(lines.replace(before, f"{_sha256(config)}  {CONFIG_FILE}\n"))


def _sha256(path: Path) -> str | None:
    try:
        return sha256(path)
    except (OSError, ValueError):  # ValueError: a damaged name is no path
        return None


def _package_files() -> Iterator[tuple[str, Path]]:
    for path in _PACKAGE.rglob("*"):
        inside = path.relative_to(_PACKAGE)
        if path.is_file() and "__pycache__" not in inside.parts and inside.parts[0] != SHARE:
            yield f"{_PACKAGE.name}/{inside.as_posix()}", path


def manifest(*, version: str, handler: str) -> dict[str, object]:
    """What TorchServe reads first of an archive."""
    return {
        "createdOn": "01/01/1980 00:00:00",  # TorchServe requires a time; the real one would change the bytes
        "runtime": "python",
        "model": {
            "modelName": MODEL_NAME,
            "modelVersion": version,
            "handler": handler,
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
