"""`etenet serve`: starts TorchServe, says when it is truly ready, and ends it.

TorchServe runs in a scratch folder of its own that is deleted in the end, so nothing is written elsewhere and no
state survives a restart. On SIGTERM or Ctrl-C what was taken in is answered first; a second one leaves at once. This
file, `health.py` and the handler are the only ones that know TorchServe.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from etenet.errors import EtenetError, UsageError, counted
from etenet.runtime import CPU_BATCH_CLIPS
from etenet.serving import archive
from etenet.serving.config import ServerConfig, is_free
from etenet.serving.exporter import exporter
from etenet.serving.health import Health
from etenet.serving.torchserve import TorchServe, gpus_of

START_DEADLINE_S = 620.0  # a little more than TorchServe gives a worker (`startupTimeout`)
IDLE_S = 1.0  # this long must nothing be pending: a batch on its way to its worker is nowhere counted


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
        torchserve = TorchServe(model, config, scratch, worker_clips=_set_up(model, gpus_of(os.environ)))
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


def _set_up(model: Path, gpus: int) -> int:
    """Give TorchServe the archive's values for GPUs where there are some; returns how many clips workers then have."""
    found = archive.configuration(model)
    if gpus and (on_gpus := found.get("gpu")):
        workers, batch = gpus * on_gpus["workers"], on_gpus["batchSize"]
        _say(f"{counted(gpus, 'GPU')}: {counted(workers, 'worker')} with {batch} clips at a time")
        archive.configure(model, {"minWorkers": workers, "maxWorkers": workers, "batchSize": batch})
        return int(workers * batch)
    return int(found.get("maxWorkers", 1) * found.get("batchSize", CPU_BATCH_CLIPS))


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
