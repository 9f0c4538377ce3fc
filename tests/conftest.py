"""Fixtures of several test files: the demo checkpoint, the examples, the reference data, and real servers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
import pytest
from hypothesis import settings
from prometheus_client.parser import text_string_to_metric_families

import etenet
from benchmarks.rig.servers import config_on_free_ports
from etenet import java
from etenet.model import checkpoint as checkpoints
from etenet.model.vocabulary import Vocabulary
from etenet.serving import archive
from etenet.serving.config import ServerConfig
from etenet.serving.loopback import WITHOUT_PROXY, SocketFile
from tests.hostile.alarm import Alarm
from training import prepare

REPOSITORY = Path(__file__).parent.parent
REAL = REPOSITORY / "model_store" / "real.pt"
DEMO = REPOSITORY / "model_store" / "demo.pt"
HERE = ("--checkpoint", str(DEMO))
CAPTION = ("caption", *HERE)  # the command with the model whose answers are known
EXAMPLES: dict[str, str] = json.loads((REPOSITORY / "examples" / "captions.json").read_text())
START_DEADLINE_S = 120.0


# Whatever proxies the environment names, clients of the tests (curl, browsers, schemathesis) talk to this machine.
for _name in ("no_proxy", "NO_PROXY"):
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), "localhost", "127.0.0.1", "::1")))


# Tests press Ctrl-C, which everything ignores that a shell started in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """After each test. A later one, which waits for what a signal does, would wait in vain."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# A busy machine makes no example wrong.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


# What jobs keep for the next one stays apart from what the user keeps.
_cache = tempfile.TemporaryDirectory(prefix="etenet-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hostile", action="store_true", help="run attacks at full length (make test-hostile)")
    parser.addoption("--soak-s", type=float, default=3600.0, help="how long the soak test with --hostile takes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave long tests to `make test-hostile`, which selects them and those with a long form by their marks."""
    for item in items:
        if "thorough" in getattr(item, "fixturenames", ()):
            item.add_marker("thorough")
    if not config.getoption("--hostile"):
        long = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)


@pytest.fixture(scope="session")
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether attacks run at full length."""
    return bool(request.config.getoption("--hostile"))


@pytest.fixture(scope="session")
def captioner() -> etenet.Captioner:
    return etenet.load(DEMO, compiled_encoder=False)


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network with a handful of words."""
    path = tmp_path_factory.mktemp("checkpoint") / "small.pt"
    checkpoints.save(checkpoints.initialise("squeezenet1_1", Vocabulary(["a", "dog", "runs"]), crop_px=64), path)
    return path


@pytest.fixture
def folder_with_handler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A folder for `running_server`, whose archive has the demo checkpoint and this code at the end of its handler."""

    def folder_with(code: str) -> Path:
        handler = tmp_path / "handler"
        shutil.copytree(REPOSITORY / "handler", handler)
        with (handler / archive.HANDLER_FILE).open("a") as file:
            file.write(code)
        monkeypatch.setattr(archive, "bundled", lambda _: handler)
        archive.package(DEMO, tmp_path / "model_store" / "etenet.mar")
        return tmp_path

    return folder_with


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """This user has none, and no entry in the list of users."""

    def unknown(_: int) -> NoReturn:
        raise KeyError

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.fixture(scope="session")
def reference_data() -> Path:
    folder = os.environ.get("ETENET_REFERENCE_DATA")
    if not folder:
        pytest.skip("ETENET_REFERENCE_DATA is not set: the reference data is not part of the repository")
    return (REPOSITORY / folder).resolve()


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    content_type: str
    body: bytes
    request_id: str = field(compare=False)  # different for every request
    retry_after: str = field(compare=False)

    def json(self) -> Any:
        return json.loads(self.body)


def ask(url: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Response:
    """GET without a body, PUT with one. An error status raises nothing."""
    request = urllib.request.Request(url, body, headers or {}, method="GET" if body is None else "PUT")
    if body is not None and not request.has_header("Content-type"):
        request.add_header("Content-type", "application/octet-stream")
    try:
        with WITHOUT_PROXY.open(request, timeout=600) as response:
            return _response(response.status, response)
    except urllib.error.HTTPError as error:
        return _response(error.code, error)


def _response(status: int, response: Any) -> Response:
    headers = response.headers
    return Response(
        status,
        headers.get("Content-Type", ""),
        response.read(),
        headers.get("X-Request-Id", ""),
        headers.get("Retry-After", ""),
    )


@dataclass(slots=True)
class Server:
    """A running `etenet serve`."""

    process: subprocess.Popen[bytes]
    inference: str
    torchserve: str  # the address of its own metrics
    exporter: str
    log: Path

    @property
    def management(self) -> str:
        """The socket file of TorchServe's management API."""
        (folder,) = [text for text in self.java().cmdline() if text.startswith("-Djava.io.tmpdir=")]
        return SocketFile(Path(folder.partition("=")[2]) / "management").url

    @property
    def predictions(self) -> str:
        return f"{self.inference}/predictions/etenet"

    def java(self) -> psutil.Process:
        (java,) = [one for one in psutil.Process(self.process.pid).children() if "java" in one.name()]
        return java

    def worker(self) -> psutil.Process | None:
        """The process that captions; None if none is ready."""
        (model,) = ask(f"{self.management}/models/etenet").json()
        for worker in model["workers"]:
            if worker["status"] == "READY" and psutil.pid_exists(worker["pid"]):  # TorchServe learns later of a death
                return psutil.Process(worker["pid"])
        return None

    def caption(self, body: bytes, **headers: str) -> Response:
        return ask(self.predictions, body, {name.replace("_", "-"): value for name, value in headers.items()})

    def figures(self) -> dict[str, float]:
        """Every sample of /metrics by its name, with its labels in braces."""
        samples = {}
        for family in text_string_to_metric_families(ask(f"{self.exporter}/metrics").body.decode()):
            for sample in family.samples:
                labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
                samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
        return samples

    def accepted(self) -> float:
        """Requests that TorchServe has put into its queue since it started."""
        families = text_string_to_metric_families(ask(f"{self.torchserve}/metrics").body.decode())
        samples = [sample for family in families for sample in family.samples]
        return sum(sample.value for sample in samples if sample.name == "ts_inference_requests_total")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


def is_open(port: int) -> bool:
    """Whether a program listens on the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def runs(pid: int) -> bool:
    """Whether a process runs. A zombie, for which no parent has waited yet, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def decoders_of(parent: int) -> list[int]:
    """The decoder processes of a process."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, above = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(above) == parent and state not in "ZX" and b"decode_deadline_s" in command:
            pids.append(int(folder.name))
    return sorted(pids)


@contextmanager
def running_server(
    *arguments: str, config: Path | None = None, folder: Path = REPOSITORY, remembers: bool = False
) -> Iterator[Server]:
    """Start `etenet serve` in a folder, on free ports, and wait until it is ready.

    Unless it `remembers`, a clip that comes again is as much work as before.
    """
    with tempfile.TemporaryDirectory() as scratch:
        where = ServerConfig.read(config or config_on_free_ports(Path(scratch)))
        log = Path(scratch) / "serve.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "etenet", "serve", "--config", str(where.path), *arguments],
                cwd=folder,
                env=dict(os.environ) if remembers else {**os.environ, "ETENET_FEATURE_CACHE_BYTES": "0"},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        server = Server(process, *(each.url for each in where.addresses), log)
        try:
            wait_until(lambda: b"ready. Try it" in log.read_bytes() or process.poll() is not None, START_DEADLINE_S)
            assert process.poll() is None, log.read_text()
            yield server
        finally:
            if process.poll() is None:
                server.stop()


def wait_until(condition: Callable[[], bool], deadline_s: float) -> None:
    """Poll a condition; the test fails if it does not become true in time."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"did not become true within {deadline_s} s")
        time.sleep(0.05)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A real TorchServe with the demo checkpoint, as it is shipped."""
    with running_server("--checkpoint", str(DEMO), remembers=True) as running:
        yield running


@pytest.fixture(scope="session")
def features_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of given features: too small to learn much, and fast to train on."""
    folder = tmp_path_factory.mktemp("features")
    clips, rng = [f"clip{number}" for number in range(16)], np.random.default_rng(0)
    np.save(folder / "given.npy", rng.normal(size=(len(clips), 4, 8)).astype(np.float32))
    things, motions = ("a dog", "a cat", "the old man", "a child"), ("is running", "is singing a song", "jumps")
    lines = [
        {
            "video": clip,
            "captions": [f"{things[number % 4]} {motion}" for motion in motions],
            "split": "validation" if number > 12 else "train",
        }
        for number, clip in enumerate(clips)
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--features", str(folder / "given.npy"), "--captions", str(folder / "captions.jsonl")]
    prepare.main(["features", *given, "--out", str(folder / "data")])
    return folder / "data"


@pytest.fixture
def alarm(tmp_path: Path) -> Iterator[Alarm]:
    alarm = Alarm(tmp_path / "trap")
    yield alarm
    alarm.close()


@pytest.fixture
def java_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replace Java by a shell script."""

    def replace(script: str) -> None:
        program = tmp_path / "java"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(java, "find_java", lambda: program)

    return replace
