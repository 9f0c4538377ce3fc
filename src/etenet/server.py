"""`etenet serve`: starts TorchServe, says when it is truly ready, and ends it.

TorchServe runs in a scratch folder of its own that is deleted in the end, so nothing is written elsewhere and no
state survives a restart. Readiness is a caption: /ready answers 200 only if a small clip sent through the whole
server came back captioned a moment ago. This file and the handler are the only ones that know TorchServe.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from etenet import archive
from etenet.config import CANARY_CLIP
from etenet.errors import EtenetError, UsageError
from etenet.java import find_java
from etenet.prctl import PR_SET_PDEATHSIG, prctl

START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 20.0
READINESS_CACHE_S = 2.0
CANARY_DEADLINE_S = 30.0

_BATCH = 8  # batchSize in handler/model-config.yaml


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int

    @property
    def url(self) -> str:
        """Where this machine reaches the address."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """What `etenet serve` reads of config.properties; TorchServe reads the file itself."""

    path: Path
    inference: Address
    management: Address
    exporter: Address
    others: tuple[Address, ...]  # ports TorchServe takes besides
    queue: int  # requests waiting at most
    max_body_bytes: int

    @classmethod
    def read(cls, path: Path) -> ServerConfig:
        if not path.is_file():
            raise UsageError(f"no configuration at {path}; give one with --config or run in the repository's folder")
        properties = {
            key.strip(): value.strip()
            for key, separator, value in (line.partition("=") for line in path.read_text().splitlines())
            if separator and not key.lstrip().startswith("#")
        }

        def address(name: str, default: str) -> Address:
            parts = urlsplit(properties.get(name, default))
            try:
                return Address(parts.hostname or "127.0.0.1", parts.port or 80)
            except ValueError as error:
                raise UsageError(f"{path}: {name} must look like {default}, got {properties[name]!r}") from error

        return cls(
            path=path.resolve(),
            inference=address("inference_address", "http://127.0.0.1:8080"),
            management=address("management_address", "http://127.0.0.1:8081"),
            exporter=address("exporter_address", "http://127.0.0.1:8083"),
            others=(
                address("metrics_address", "http://127.0.0.1:8082"),
                Address("127.0.0.1", int(properties.get("grpc_inference_port", "7070"))),
                Address("127.0.0.1", int(properties.get("grpc_management_port", "7071"))),
            ),
            queue=int(properties.get("job_queue_size", "100")),
            max_body_bytes=int(properties.get("max_request_size", "6553500")),
        )

    @property
    def java_memory_bytes(self) -> int:
        """What TorchServe's Java may take of the heap, and the same again outside it.

        Enough for the queue, a batch that is captioned, one that is waited for and some requests that come in, all of
        the largest size: where Java runs out of memory, TorchServe answers nobody any more.
        """
        return max(2**29, 5 * (self.queue + 3 * _BATCH) * self.max_body_bytes // 4)

    @property
    def addresses(self) -> tuple[Address, ...]:
        return (self.inference, self.management, self.exporter, *self.others)


def is_free(address: Address) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError:
            return False
    return True


class TorchServe:
    """The TorchServe process, with one archive or the folder that one was unpacked to.

    `scratch` is a short path (its sockets must stay under 108 bytes).
    """

    def __init__(self, model: Path, config: ServerConfig, scratch: Path) -> None:
        spec = importlib.util.find_spec("ts")
        if spec is None or spec.origin is None:
            raise UsageError("TorchServe is not installed; install it with: pip install torchserve pyyaml")
        packages = Path(spec.origin).parent.parent
        self.log = scratch / "logs" / "worker.log"
        command = [
            str(find_java()),
            f"-Dmodel_server_home={packages}",
            f"-Djava.io.tmpdir={scratch}",
            f"-Dlog4j.configurationFile={(archive.handler_folder() / 'log4j2.xml').as_uri()}",
            "-XX:-UsePerfData",
            # Java passes bytes on: the optimising compiler would only take cores from the network.
            "-XX:TieredStopAtLevel=1",
            # Bodies are large arrays: G1, the default, would scatter them until none finds room any more.
            "-XX:+UseParallelGC",
            f"-Xmx{config.java_memory_bytes}",
            f"-XX:MaxDirectMemorySize={config.java_memory_bytes}",
            *("-cp", str(packages / "ts" / "frontend" / "*")),
            "org.pytorch.serve.ModelServer",
            *("--python", sys.executable),
            *("-f", str(config.path)),
            *("-s", str(model.parent)),
            "-ncs",
            *("-m", f"{archive.MODEL_NAME}={model.name}"),
        ]
        # Its own session: Ctrl-C in a terminal must reach the launcher only, which then ends TorchServe in order.
        self._process = subprocess.Popen(
            command,
            cwd=scratch,
            env=_environment(scratch),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            stderr=sys.stderr.fileno(),
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        """End TorchServe and its workers; returns when they are gone."""
        if self.alive:
            self._process.terminate()
        try:
            self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _end_with_parent() -> None:
    """In the child, before it becomes TorchServe: be sent SIGTERM when the launcher dies, however it dies."""
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _environment(scratch: Path) -> Mapping[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TS_")}
    return {
        **inherited,
        **dict.fromkeys(("TEMP", "TMP", "TMPDIR"), str(scratch)),
        "LOG_LOCATION": str(scratch / "logs"),
    }


class Health:
    """Whether a caption works (asked for, then remembered for a moment) and whether TorchServe runs at all."""

    def __init__(self, server: TorchServe, inference: Address) -> None:
        self._server = server
        self._url = f"{inference.url}/predictions/{archive.MODEL_NAME}"
        self._lock = threading.Lock()
        self._checked_at = float("-inf")
        self._fault = "not yet checked"
        self.leaving = False

    @cached_property
    def _canary(self) -> bytes:
        return CANARY_CLIP.read_bytes()

    @property
    def alive(self) -> bool:
        return self._server.alive

    def fault(self) -> str:
        """What is wrong, or an empty string when the server is ready."""
        if self.leaving:
            return "the server is shutting down"
        if not self.alive:
            return "TorchServe has ended"
        with self._lock:
            if time.monotonic() - self._checked_at > READINESS_CACHE_S:
                self._fault = self._ask()
                self._checked_at = time.monotonic()
            return self._fault

    def _ask(self) -> str:
        request = urllib.request.Request(self._url, data=self._canary, headers={"Content-Type": "video/mp4"})
        try:
            with urllib.request.urlopen(request, timeout=CANARY_DEADLINE_S) as response:
                caption = json.load(response)["caption"]
        except urllib.error.HTTPError as error:
            return f"the test clip was answered with status {error.code}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"the test clip got no caption: {error}"
        return "" if isinstance(caption, str) else "the test clip got no caption"


@contextmanager
def _exporter(health: Health, address: Address) -> Iterator[None]:
    """Serves GET /ready and /live."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            match self.path:
                case "/ready":
                    fault = health.fault()
                    self._answer(not fault, {"ready": not fault, **({"reason": fault} if fault else {})})
                case "/live":
                    self._answer(health.alive, {"live": health.alive})
                case _:
                    self._send(HTTPStatus.NOT_FOUND, {"error": {"code": "not_found", "message": "try /ready or /live"}})

        def _answer(self, good: bool, body: Mapping[str, object]) -> None:
            self._send(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE, body)

        def _send(self, status: HTTPStatus, body: Mapping[str, object]) -> None:
            payload = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, format: str, *arguments: object) -> None:
            """Probes come every few seconds and say nothing worth a line."""

    server = ThreadingHTTPServer((address.host, address.port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="exporter", daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def serve(mar: Path, config: ServerConfig) -> int:
    """Run until SIGTERM or Ctrl-C and return the exit status; `UsageError` where it cannot even start."""
    taken = [str(address.port) for address in config.addresses if not is_free(address)]
    if taken:
        raise UsageError(
            f"port {', '.join(taken)} is taken; stop what uses it, or copy {config.path.name}, change its ports and "
            "give the copy with --config"
        )
    leave = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: leave.set())
    with tempfile.TemporaryDirectory(prefix="etenet-") as scratch:
        _say("starting TorchServe ...")
        model = Path(scratch) / "model_store" / archive.MODEL_NAME
        archive.unpack(mar, model)  # TorchServe would take ten times as long
        torchserve = TorchServe(model, config, Path(scratch))
        try:
            health = Health(torchserve, config.inference)
            with _exporter(health, config.exporter):
                _await_ready(health, leave)
                if not leave.is_set():
                    _say_ready(config)
                while torchserve.alive and not leave.wait(0.2):
                    pass
                health.leaving = True
                if not leave.is_set():
                    raise EtenetError("TorchServe ended by itself; its last words are above")
                _say("stopping ...")
        except EtenetError as error:
            _say(f"error: {error}")
            _show_tail(torchserve.log)
            return 1
        finally:
            torchserve.stop()
    _say("stopped")
    return 0


def _await_ready(health: Health, leave: threading.Event) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while (fault := health.fault()) and not leave.wait(0.2):
        if not health.alive:
            raise EtenetError("TorchServe ended while starting; its last words are above")
        if time.monotonic() > deadline:
            raise EtenetError(f"not ready after {START_DEADLINE_S:.0f} s: {fault}")


def _say_ready(config: ServerConfig) -> None:
    where = f"localhost:{config.inference.port}/predictions/{archive.MODEL_NAME}"
    examples = sorted(Path("examples").glob("*.mp4"))
    _say(f"ready. Try it:\n\n    curl -T {examples[0] if examples else 'clip.mp4'} {where}\n")


def _show_tail(log: Path, lines: int = 30) -> None:
    if log.is_file():
        _say(f"the workers' last lines ({log.name}):")
        sys.stderr.write("\n".join(log.read_text(errors="replace").splitlines()[-lines:]) + "\n")


def _say(text: str) -> None:
    print(f"etenet serve: {text}", file=sys.stderr, flush=True)
