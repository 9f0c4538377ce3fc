"""`etenet serve`: starts TorchServe, waits until it captions, and stops it.

TorchServe runs in its own scratch folder, which is deleted at the end: nothing is written elsewhere, and no state
survives a restart. On SIGTERM, Ctrl-C or SIGHUP accepted requests are answered first and later ones refused; a second
signal drops them.
"""

from __future__ import annotations

import http.client
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.request import getproxies

from etenet.errors import EtenetError, UsageError, counted
from etenet.linux import end_with_parent
from etenet.model import checkpoint as checkpoints
from etenet.runtime import CPU_BATCH_CLIPS
from etenet.serving import archive, draining
from etenet.serving.config import ServerConfig, from_environment, unusable
from etenet.serving.exporter import exporter
from etenet.serving.health import Health
from etenet.serving.loopback import Address
from etenet.serving.relay import Relay
from etenet.serving.scratch import scratch_folder
from etenet.serving.torchserve import TorchServe, delay_torch, gpus_of

DEFAULT_STARTUP_S = 120  # TorchServe's
START_GRACE_S = 20.0  # beyond what TorchServe gives a worker (`startupTimeout`)
# A shutdown waits until nothing was pending for so long: a batch on its way to its worker is counted nowhere.
IDLE_S = 1.0
_WHERE_TO_LOOK = "its last lines are above, those of its workers below; check this machine with: etenet doctor"


def serve(config: ServerConfig, served: Path) -> int:
    """Serve an archive (.mar), or a checkpoint, which is packaged first, until SIGTERM, Ctrl-C or SIGHUP.

    Returns the exit status. Raises `UsageError` if it cannot start.
    """
    if fault := unusable(config.addresses):
        raise UsageError("; ".join(fault))
    with _on_signals() as (stop, stop_now), scratch_folder(_log) as scratch:
        mar = served
        if served.suffix != ".mar":
            checkpoints.inspect(served)
            _log(f"packaging {served}, which takes up to a minute the first time ...")
            mar = _packaged(served, scratch / "etenet.mar", stop)
        if stop.is_set():
            _log("stopped")
            return 0
        model = scratch / "model_store" / archive.MODEL_NAME
        archive.unpack(mar, model)  # ten times as fast as TorchServe itself
        _log("starting TorchServe ...")
        about, worker_clips = archive.about(model), _set_up(model, gpus_of(os.environ))
        startup_s = archive.configuration(model).get("startupTimeout", DEFAULT_STARTUP_S)
        _log(f"the model is {about}")
        torchserve = TorchServe(
            model,
            config,
            scratch,
            versions=[draining.write_model(model.with_name("draining"))],
            worker_clips=worker_clips,
        )
        health = Health(
            alive=lambda: torchserve.alive,
            inference=config.inference,
            management=torchserve.management,
            figures=torchserve.figures,
            probe_secret=torchserve.probe_secret,
        )
        try:
            relay = Relay(config.inference, config.max_body_bytes, config.cors_allowed_origin)
            with health.watching(), exporter(health, config.exporter, torchserve.figures, relay):
                _await_ready(torchserve, health, stop, startup_s + START_GRACE_S)
                if not stop.is_set():
                    _log_ready(config, about.name)
                while torchserve.alive and not stop.wait(0.2):
                    pass
                if not stop.is_set():
                    raise EtenetError(f"TorchServe ended by itself; {_WHERE_TO_LOOK}")
                health.stopping = True
                _drain(torchserve, health, stop_now, config)
        except EtenetError as error:
            _log(f"error: {error}")
            _show_tail(torchserve.log)
            return 1
        finally:
            torchserve.stop()
    _log("stopped")
    return 0


@contextmanager
def _on_signals() -> Iterator[tuple[threading.Event, threading.Event]]:
    """The first signal that ends a server sets the first event, the next one the second."""
    stop, stop_now = threading.Event(), threading.Event()

    def on_signal(*_: object) -> None:
        # By a thread: the signal may find this one in the middle of `stop.wait`, with the lock that `set` needs.
        threading.Thread(target=(stop_now if stop.is_set() else stop).set).start()

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as by nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield stop, stop_now
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _packaged(checkpoint: Path, mar: Path, stop: threading.Event) -> Path:
    """By a process of its own, with which the memory that torch takes is given back. `stop` kills it.

    Raises `UsageError`.
    """
    command = [sys.executable, "-P", "-m", "etenet", "package", str(checkpoint), "--out", str(mar)]
    end = partial(end_with_parent, signal.SIGKILL, parent=os.getpid())
    said: str | None = None
    with subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(mar.parent)},  # deleted with the scratch folder, also after a kill
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        errors="replace",
        start_new_session=True,
        preexec_fn=end if sys.platform == "linux" else None,
    ) as process:
        while said is None:
            with suppress(subprocess.TimeoutExpired):
                _, said = process.communicate(timeout=0.2)
            if stop.is_set():
                process.kill()
    if stop.is_set():
        return mar
    lines = [line.removeprefix("etenet package: ") for line in said.splitlines()]
    if process.returncode:
        raise UsageError(lines[-1] if lines else f"packaging {checkpoint} ended with status {process.returncode}")
    for line in lines:
        if not line.endswith("..."):  # what was announced has happened
            _log(line)
    return mar


def _set_up(model: Path, gpus: int) -> int:
    """Configure the archive for the GPUs, if there are any; returns how many clips all workers have at a time."""
    settings = archive.configuration(model)
    if changes := from_environment(settings, os.environ):
        archive.configure(model, changes)
        settings |= changes
    archive.require_workers(f"{archive.CONFIG_FILE}, as the environment changes it", settings)
    if gpus and (on_gpus := settings.get("gpu")):
        workers, batch = gpus * on_gpus.get("workers", 1), on_gpus.get("batchSize", CPU_BATCH_CLIPS)
        _log(f"{counted(gpus, 'GPU')}: {counted(workers, 'worker')} with {batch} clips at a time")
        archive.configure(model, {"minWorkers": workers, "maxWorkers": workers, "batchSize": batch})
        return int(workers * batch)
    delay_torch(model)
    return int(settings.get("maxWorkers", 1) * settings.get("batchSize", CPU_BATCH_CLIPS))


def _await_ready(torchserve: TorchServe, health: Health, stop: threading.Event, deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    while (fault := health.fault) and not stop.wait(0.2):
        if torchserve.failure:
            raise EtenetError(f"the model does not load: {torchserve.failure}")
        if not torchserve.alive:
            raise EtenetError(f"TorchServe ended while starting; {_WHERE_TO_LOOK}")
        if time.monotonic() > deadline:
            raise EtenetError(
                f"not ready after {deadline_s:.0f} s: {fault}; the lines below may say why, or run: etenet doctor"
            )


def _drain(torchserve: TorchServe, health: Health, stop_now: threading.Event, config: ServerConfig) -> None:
    """Let newcomers be refused, and wait until all requests that were accepted before are answered.

    TorchServe may not answer for seconds, while Java collects garbage or a container is throttled. It is asked again.
    """
    _log("stopping: accepted requests are answered first; another signal drops them ...")
    end, idle_since, refusing, silent = time.monotonic() + config.drain_deadline_s, math.inf, False, False
    while time.monotonic() - idle_since < IDLE_S and torchserve.alive and not stop_now.wait(0.05):
        try:
            if not refusing:
                health.refuse_newcomers()
                refusing = True
            pending = counted(count, "request") if (count := health.pending()) else ""
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            pending = "an unknown number of requests"
            if not silent:
                _log(f"TorchServe does not report pending requests ({error}); it is asked again")
            silent = True
        idle_since = math.inf if pending else min(idle_since, time.monotonic())
        if time.monotonic() > end:
            if pending:
                _log(
                    f"dropped unanswered after {config.drain_deadline_s:g} s: {pending}; "
                    "raise drain_deadline_s to wait longer"
                )
            return


def _log_ready(config: ServerConfig, model_name: str) -> None:
    where = f"{_seen_from_here(config.inference)}/predictions/{archive.MODEL_NAME}"
    examples = sorted(Path("examples", model_name).glob("*.mp4")) or sorted(Path("examples").glob("*.mp4"))
    clip = examples[0] if examples else "clip.mp4"
    # Where the environment names a proxy, curl asks it even for localhost.
    no_proxy = "--noproxy localhost " if getproxies().keys() & {"http", "all"} else ""
    page = f"http://{_seen_from_here(config.exporter)}"
    _log(f"ready. Try it:\n\n    curl {no_proxy}-T {clip} {where}\n\nor open {page} in a browser\n")


def _seen_from_here(address: Address) -> str:
    host = "localhost" if address.host in ("0.0.0.0", "127.0.0.1") else address.host
    return f"{host}:{address.port}"


def _show_tail(log: Path, lines: int = 30) -> None:
    if log.is_file():
        _log(f"the last lines of the workers ({log.name}):")
        _print("\n".join(log.read_text(errors="replace").splitlines()[-lines:]))


def _log(text: str) -> None:
    _print(f"etenet serve: {text}")


def _print(text: str) -> None:
    """No request is lost because nobody reads the log any more, or because its disk is full."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
