"""`etenet serve`: starts TorchServe, says when it is truly ready, and ends it.

TorchServe runs in a scratch folder of its own that is deleted in the end, so nothing is written elsewhere and no
state survives a restart. On SIGTERM or Ctrl-C what was taken in is answered first; a second one leaves at once. This
file, `health.py` and the handler are the only ones that know TorchServe.
"""

from __future__ import annotations

import fcntl
import importlib.util
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from etenet import archive, metrics
from etenet.config import FAILURE_FILE_VARIABLE, REQUEST_LOG_VARIABLE, thread_settings
from etenet.errors import EtenetError, UsageError
from etenet.health import Address, Health, exporter
from etenet.java import find_java
from etenet.prctl import PR_SET_PDEATHSIG, prctl

START_DEADLINE_S = 620.0  # a little more than TorchServe gives a worker (`startupTimeout`)
STOP_DEADLINE_S = 20.0
GPU_QUESTION_DEADLINE_S = 30.0
IDLE_S = 1.0  # this long must nothing be pending: a batch on its way to its worker is nowhere counted

_COMPILED_CODE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
IN_HAND = 8  # clips that one worker has at a time: batchSize in handler/model-config.yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """What `etenet serve` reads of config.properties; TorchServe reads the file itself."""

    path: Path
    inference: Address
    management: Address
    metrics: Address  # TorchServe's own
    exporter: Address
    grpc: tuple[Address, Address]
    queue: int  # requests waiting at most
    max_body_bytes: int
    request_log: str  # json, plain or off
    drain_deadline_s: float  # how long a shutdown waits for what was taken in

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
            metrics=address("metrics_address", "http://127.0.0.1:8082"),
            exporter=address("exporter_address", "http://127.0.0.1:8083"),
            grpc=(
                Address("127.0.0.1", int(properties.get("grpc_inference_port", "7070"))),
                Address("127.0.0.1", int(properties.get("grpc_management_port", "7071"))),
            ),
            queue=int(properties.get("job_queue_size", "100")),
            max_body_bytes=int(properties.get("max_request_size", "6553500")),
            request_log=properties.get("request_log", "plain"),
            drain_deadline_s=float(properties.get("drain_deadline_s", "60")),
        )

    def java_memory_bytes(self, in_hand: int = IN_HAND) -> int:
        """What TorchServe's Java may take of the heap, and the same again outside it.

        Enough for the queue, the `in_hand` clips that are captioned, as many that are waited for and that come in, all
        of the largest size: where Java runs out of memory, TorchServe answers nobody any more.
        """
        return max(2**29, 5 * (self.queue + 3 * in_hand) * self.max_body_bytes // 4)

    @property
    def addresses(self) -> tuple[Address, ...]:
        return (self.inference, self.management, self.metrics, self.exporter, *self.grpc)


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

    def __init__(self, model: Path, config: ServerConfig, scratch: Path, *, in_hand: int = IN_HAND) -> None:
        spec = importlib.util.find_spec("ts")
        if spec is None or spec.origin is None:
            raise UsageError("TorchServe is not installed; install it with: pip install torchserve pyyaml")
        packages = Path(spec.origin).parent.parent
        self.log, self.figures, self._failure = (
            scratch / "logs" / "worker.log",
            scratch / "metrics",
            scratch / "failure",
        )
        self.figures.mkdir()
        java_memory_bytes = config.java_memory_bytes(in_hand)
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
            f"-Xmx{java_memory_bytes}",
            f"-XX:MaxDirectMemorySize={java_memory_bytes}",
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
            env={
                **_environment(scratch),
                metrics.FOLDER_VARIABLE: str(self.figures),
                FAILURE_FILE_VARIABLE: str(self._failure),
                REQUEST_LOG_VARIABLE: config.request_log,
            },
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            stderr=sys.stderr.fileno(),
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def failure(self) -> str:
        """Why the model does not load, or an empty string."""
        return self._failure.read_text() if self._failure.exists() else ""

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
        _COMPILED_CODE_VARIABLE: str(_compiled_code()),
        **thread_settings(inherited),
        **inherited,
        **dict.fromkeys(("TEMP", "TMP", "TMPDIR"), str(scratch)),
        "LOG_LOCATION": str(scratch / "logs"),
    }


def _compiled_code() -> Path:
    """Where what was compiled for a GPU outlives the server. Source: XDG Base Directory Specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "etenet" / "compiled"


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder that is deleted in the end; what launchers left that were killed is deleted first."""
    for lock in Path(tempfile.gettempdir()).glob("etenet-*/lock"):
        with suppress(OSError), lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="etenet-") as folder, (Path(folder) / "to be locked").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.rename(file.name, Path(folder) / "lock")
        yield Path(folder)


def serve(config: ServerConfig, *, mar: Path, checkpoint: Path | None = None) -> int:
    """Serve an archive, or rather a checkpoint, which is packaged first, until SIGTERM or Ctrl-C.

    Returns the exit status; `UsageError` where it cannot even start.
    """
    taken = [str(address.port) for address in config.addresses if not is_free(address)]
    if taken:
        raise UsageError(
            f"port {', '.join(taken)} is taken; stop what uses it, or copy {config.path.name}, change its ports and "
            "give the copy with --config"
        )
    leave, at_once = threading.Event(), threading.Event()

    def ask_to_leave(*_: object) -> None:
        (at_once if leave.is_set() else leave).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_leave)
    with _scratch() as scratch:
        if checkpoint:
            mar = archive.package(checkpoint, scratch / "etenet.mar")
        _say("starting TorchServe ...")
        model = scratch / "model_store" / archive.MODEL_NAME
        archive.unpack(mar, model)  # TorchServe would take ten times as long
        torchserve = TorchServe(model, config, scratch, in_hand=_set_up(model, gpus_of(os.environ)))
        health = Health(
            alive=lambda: torchserve.alive,
            inference=config.inference,
            management=config.management,
            figures=torchserve.figures,
        )
        try:
            with exporter(health, config.exporter, torchserve.figures):
                _await_ready(torchserve, health, leave)
                if not leave.is_set():
                    _say_ready(config)
                while torchserve.alive and not leave.wait(0.2):
                    pass
                if not leave.is_set():
                    raise EtenetError("TorchServe ended by itself; its last words are above")
                health.leaving = True
                _drain(torchserve, health, at_once, config.drain_deadline_s)
        except EtenetError as error:
            _say(f"error: {error}")
            _show_tail(torchserve.log)
            return 1
        finally:
            torchserve.stop()
    _say("stopped")
    return 0


def gpus_of(environment: Mapping[str, str]) -> int:
    """How many GPUs there are for workers. torch would say so, but takes seconds to import."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return sum(name.strip() not in ("", "-1") for name in visible.split(","))
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            env=environment,
            capture_output=True,
            check=True,
            timeout=GPU_QUESTION_DEADLINE_S,
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    return len(listed.stdout.split())


def _set_up(model: Path, gpus: int) -> int:
    """Give TorchServe the archive's values for GPUs where there are some; returns how many clips workers then have."""
    found = archive.configuration(model)
    if gpus and (on_gpus := found.get("gpu")):
        workers, batch = gpus * on_gpus["workers"], on_gpus["batchSize"]
        _say(f"{_counted(gpus, 'GPU')}: {_counted(workers, 'worker')} with {batch} clips at a time")
        archive.configure(model, {"minWorkers": workers, "maxWorkers": workers, "batchSize": batch})
        return int(workers * batch)
    return int(found.get("maxWorkers", 1) * found.get("batchSize", IN_HAND))


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _await_ready(torchserve: TorchServe, health: Health, leave: threading.Event) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while (fault := health.fault()) and not leave.wait(0.2):
        if torchserve.failure:
            raise EtenetError(f"the model does not load: {torchserve.failure}")
        if not torchserve.alive:
            raise EtenetError("TorchServe ended while starting; its last words are above")
        if time.monotonic() > deadline:
            raise EtenetError(f"not ready after {START_DEADLINE_S:.0f} s: {fault}")


def _drain(torchserve: TorchServe, health: Health, at_once: threading.Event, deadline_s: float) -> None:
    """Wait until everything accepted is answered.

    TorchServe may be silent for seconds, while Java collects garbage or a container is throttled: it is asked again.
    """
    _say("stopping: what was taken in is answered first; once more, and it is dropped ...")
    end, idle_since, silent = time.monotonic() + deadline_s, math.inf, False
    while time.monotonic() - idle_since < IDLE_S and torchserve.alive and not at_once.wait(0.05):
        try:
            pending = str(health.pending() or "")
        except (OSError, ValueError, KeyError, IndexError) as error:
            pending = "an unknown number of"
            if not silent:
                _say(f"TorchServe does not say what is pending ({error}); it is asked again")
            silent = True
        idle_since = math.inf if pending else min(idle_since, time.monotonic())
        if time.monotonic() > end:
            _say(f"{pending} requests are dropped: they were not answered within {deadline_s:g} s")
            return


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
