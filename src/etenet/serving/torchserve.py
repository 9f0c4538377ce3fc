"""The TorchServe process: its command line, its environment, how it ends, and how many GPUs its workers get."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from etenet import metrics
from etenet.assets import bundled
from etenet.errors import UsageError
from etenet.files import cache_folder
from etenet.java import find_java
from etenet.linux import end_with_parent, thread_settings
from etenet.runtime import CPU_BATCH_CLIPS
from etenet.serving import archive, cors, torchserve_classes
from etenet.serving.config import (
    CONFIG_FILE,
    CORS_VARIABLE,
    FAILURE_FILE_VARIABLE,
    PROBE_SECRET_VARIABLE,
    REQUEST_LOG_VARIABLE,
    ServerConfig,
)
from etenet.serving.loopback import SocketFile

STOP_DEADLINE_S = 20.0
NVIDIA_SMI_DEADLINE_S = 30.0

_COMPILED_CODE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


class TorchServe:
    """A TorchServe process with one archive, unpacked to the folder `model`, and further versions of it beside that.

    `scratch` is a short path, because the paths of TorchServe's sockets must stay under 108 bytes.
    """

    def __init__(
        self,
        model: Path,
        config: ServerConfig,
        scratch: Path,
        *,
        versions: Sequence[Path] = (),
        worker_clips: int = CPU_BATCH_CLIPS,
    ) -> None:
        spec = importlib.util.find_spec("ts")
        if spec is None or spec.origin is None:
            raise UsageError("TorchServe is not installed; run: etenet doctor")
        packages = Path(spec.origin).parent.parent
        self.log, self.figures, self._failure = (
            scratch / "logs" / "worker.log",
            scratch / "metrics",
            scratch / "failure",
        )
        self.probe_secret = secrets.token_hex(16)
        self.figures.mkdir()
        own = SocketFile(scratch / "management")
        self.management = config.management or own
        frontend, changed = packages / "ts" / "frontend", scratch / "classes"
        torchserve_classes.write_classes(frontend / "model-server.jar", changed)
        settings = scratch / CONFIG_FILE
        own_settings = {"management_address": f"unix:{own.path}"} if not config.management else {}
        own_settings |= cors.torchserve_settings(config.cors_allowed_origin)
        settings.write_text("\n".join([config.text, *(f"{key}={value}" for key, value in own_settings.items()), ""]))
        java_memory_bytes = config.java_memory_bytes(worker_clips)
        command = [
            str(find_java()),
            f"-Dmodel_server_home={packages}",
            f"-Djava.io.tmpdir={scratch}",
            f"-Dlog4j.configurationFile={bundled('handler/log4j2.xml').as_uri()}",
            "-XX:-UsePerfData",
            "-XX:+DisplayVMOutputToStderr",
            # Java only passes bytes on: its optimising compiler would take cores from the network and gain nothing.
            "-XX:TieredStopAtLevel=1",
            # Bodies are large arrays. G1, the default, fragments the heap until no array fits. The parallel collector
            # leaves dead ones and takes more memory instead. Little is alive: to collect everything takes 20 ms.
            "-XX:+UseSerialGC",
            # Netty's pool takes 16 MiB more whenever it finds no gap, and gives nothing back.
            "-Dio.netty.allocator.type=unpooled",
            # By default Java first fills a 64th of the machine's memory with garbage, however little is in use.
            *("-Xms64m", "-Xmn32m"),
            f"-Xmx{java_memory_bytes}",
            f"-XX:MaxDirectMemorySize={java_memory_bytes}",
            *("-cp", os.pathsep.join((str(changed), str(frontend / "*")))),
            torchserve_classes.MAIN_CLASS,
            *("--python", sys.executable),
            *("-f", str(settings)),
            *("-s", str(model.parent)),
            "-ncs",
            *(
                "-m",
                *(f"{archive.MODEL_NAME}={version.name}" for version in (model, *versions)),
            ),  # the first is the default
        ]
        end = partial(end_with_parent, signal.SIGTERM, parent=os.getpid())
        # Its own session: Ctrl-C in a terminal must reach only the launcher, which then stops TorchServe.
        self._process = subprocess.Popen(
            command,
            cwd=scratch,
            env={
                **_environment(scratch),
                metrics.FOLDER_VARIABLE: str(self.figures),
                FAILURE_FILE_VARIABLE: str(self._failure),
                PROBE_SECRET_VARIABLE: self.probe_secret,
                REQUEST_LOG_VARIABLE: config.request_log,
                CORS_VARIABLE: config.cors_allowed_origin,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # it tells there that no GPU was found; what matters it logs to stderr
            stderr=sys.stderr.fileno(),
            start_new_session=True,
            preexec_fn=end if sys.platform == "linux" else None,
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def failure(self) -> str:
        """Why the model does not load, or an empty string."""
        return self._failure.read_text() if self._failure.exists() else ""

    def stop(self) -> None:
        """End TorchServe and its workers, and wait for it."""
        if self.alive:
            self._process.terminate()
        try:
            self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def delay_torch(model: Path) -> None:
    """Have the workers of a model import torch only if they use it. TorchServe's own code does not."""
    shutil.copy(Path(__file__).with_name("lazy_torch.py"), model / "torch.py")


def _environment(scratch: Path) -> Mapping[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TS_")}
    try:
        compiled = cache_folder() / "compiled"  # code for a GPU, across restarts
    except OSError:  # no home
        compiled = scratch / "compiled"
    return {
        _COMPILED_CODE_VARIABLE: str(compiled),
        **inherited,
        **thread_settings(inherited),
        **dict.fromkeys(("TEMP", "TMP", "TMPDIR"), str(scratch)),
        "LOG_LOCATION": str(scratch / "logs"),
    }


def gpus_of(environment: Mapping[str, str]) -> int:
    """How many GPUs there are for workers. Not by torch, which takes seconds to import."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return sum(name.strip() not in ("", "-1") for name in visible.split(","))
    try:
        indices = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            env=environment,
            capture_output=True,
            check=True,
            timeout=NVIDIA_SMI_DEADLINE_S,
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    return len(indices.stdout.split())
