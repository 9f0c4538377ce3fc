"""Captioning servers, each in its own processes: ours, and two with the plain code of `benchmarks.peers`.

Ours remembers no features: the clips of a benchmark come again and again.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.rig.load import PREDICTIONS
from benchmarks.rig.record import REPOSITORY
from etenet.serving import archive as archives
from etenet.serving.config import ServerConfig
from etenet.serving.loopback import WITHOUT_PROXY
from etenet.serving.torchserve import TorchServe

START_DEADLINE_S = 180.0
_HANDLER = REPOSITORY / "benchmarks" / "peers" / "torchserve_handler.py"


@dataclass(frozen=True, slots=True)
class Served:
    url: str
    ready_s: float  # from the command to the first caption
    process: psutil.Process | None = None  # that started the others, where there is one


@contextmanager
def ours(checkpoint: Path, clip: bytes) -> Iterator[Served]:
    """`etenet serve`, with an archive packaged before the clock starts."""
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "model_store" / "etenet.mar"
        config = ServerConfig.read(config_on_free_ports(Path(scratch)))
        subprocess.run([sys.executable, "-m", "etenet", "package", checkpoint, "--out", archive], check=True)
        with _started(
            config.inference.url, clip, Path(scratch), "etenet", "serve", "--config", str(config.path)
        ) as served:
            yield served


@contextmanager
def ours_with(archive: Path, clip: bytes, **settings: int) -> Iterator[Served]:
    """TorchServe as `etenet serve` starts it, with `settings` in place of values in the archive's model-config.yaml."""
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model_store" / "etenet"
        archives.unpack(archive, model)
        forgetful = archives.configuration(model)["etenet"] | {"feature_cache_bytes": 0}
        archives.configure(model, {**settings, "etenet": forgetful})
        with _torchserve(model, clip, Path(scratch)) as served:
            yield served


@contextmanager
def plain_litserve(checkpoint: Path, clip: bytes) -> Iterator[Served]:
    """LitServe that runs the plain code."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    with _started(url, clip, REPOSITORY, "benchmarks.peers.litserve_api", str(checkpoint), str(port)) as served:
        yield served


@contextmanager
def plain_torchserve(checkpoint: Path, clip: bytes) -> Iterator[Served]:
    """TorchServe, started as `etenet serve` starts it, with the plain code as its handler."""
    model = {"modelName": "etenet", "modelVersion": "1.0", "handler": _HANDLER.name, "serializedFile": "checkpoint.pt"}
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "etenet.mar"
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))
            file.write(checkpoint, "checkpoint.pt")
            file.write(_HANDLER, _HANDLER.name)
            file.write(_HANDLER.with_name("plain.py"), "benchmarks/peers/plain.py")
        with _torchserve(archive, clip, Path(scratch)) as served:
            yield served


@contextmanager
def _torchserve(model: Path, clip: bytes, scratch: Path) -> Iterator[Served]:
    config, started = ServerConfig.read(config_on_free_ports(scratch)), time.monotonic()
    torchserve = TorchServe(model, config, scratch)
    try:
        await_caption(config.inference.url, clip, lambda: torchserve.alive)
        yield Served(config.inference.url, time.monotonic() - started)
    finally:
        torchserve.stop()


@contextmanager
def _started(url: str, clip: bytes, folder: Path, *module: str) -> Iterator[Served]:
    started = time.monotonic()
    environment = {**os.environ, "ETENET_FEATURE_CACHE_BYTES": "0"}
    process = psutil.Popen([sys.executable, "-m", *module], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    try:
        await_caption(url, clip, lambda: process.poll() is None)
        yield Served(url, time.monotonic() - started, process)
    finally:
        if process.poll() is None:
            family = process.children(recursive=True)
            process.terminate()
            _, alive = psutil.wait_procs([process, *family], timeout=10)
            for one in alive:
                one.kill()


def await_caption(url: str, clip: bytes, alive: Callable[[], bool]) -> None:
    """Send the clip until it gets a caption."""
    deadline = time.monotonic() + START_DEADLINE_S
    while alive() and time.monotonic() < deadline:
        request = urllib.request.Request(url + PREDICTIONS, data=clip, headers={"Content-Type": "video/mp4"})
        try:
            with WITHOUT_PROXY.open(request, timeout=START_DEADLINE_S):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"{url} gave no caption within {START_DEADLINE_S:.0f} s, or its server ended")


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def config_on_free_ports(folder: Path) -> Path:
    """The repository's config.properties with every port replaced by a free one."""
    lines = (REPOSITORY / "config.properties").read_text().splitlines()
    names = ("inference_address", "metrics_address", "exporter_address")
    values = {name: f"http://127.0.0.1:{port}" for name, port in zip(names, free_ports(len(names)), strict=True)}
    changed = [f"{key}={values.get(key, value)}" for key, _, value in (line.partition("=") for line in lines) if value]
    path = folder / "config.properties"
    path.write_text("\n".join(changed) + "\n")
    return path
