"""The settings that `etenet serve` reads from config.properties, and those it hands to workers. Imports no torch."""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from etenet.errors import UsageError
from etenet.runtime import CPU_BATCH_CLIPS
from etenet.serving.loopback import Address, SocketFile

FAILURE_FILE_VARIABLE = "ETENET_FAILURE_FILE"  # the file in which a worker writes why it cannot start
REQUEST_LOG_VARIABLE = "ETENET_REQUEST_LOG"  # json, plain or off


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """The settings that `etenet serve` uses. TorchServe reads the same file for its own.

    Those of its gRPC (`grpc_*`) have no effect: see `without_grpc`.
    """

    path: Path
    inference: Address
    management: Address | SocketFile | None  # None: a socket file in TorchServe's own folder
    metrics: Address  # TorchServe's own
    exporter: Address
    queue: int  # how many requests may wait
    max_body_bytes: int
    request_log: str  # json, plain or off
    drain_deadline_s: float  # how long a shutdown waits for accepted requests

    @classmethod
    def read(cls, path: Path) -> ServerConfig:
        if not path.is_file():
            raise UsageError(f"no configuration at {path}; give one with --config or run in the repository's folder")
        properties: dict[str, str] = {}
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            key, separator, value = (part.strip() for part in line.partition("="))
            if separator and not key.startswith("#"):
                if key in properties:
                    raise UsageError(f"{path}, line {number}: {key} is there twice; keep one of the two")
                properties[key] = value

        def address(name: str, default: str) -> Address:
            parts = urlsplit(properties.get(name, default))
            try:
                return Address(parts.hostname or "127.0.0.1", parts.port or 80)
            except ValueError as error:
                raise UsageError(f"{path}: {name} must look like {default}, got {properties[name]!r}") from error

        def management() -> Address | SocketFile | None:
            given = properties.get("management_address")
            if given is None and sys.platform == "linux":
                return None
            scheme, _, file = (given or "").partition(":")
            return (
                SocketFile(Path(file)) if scheme == "unix" else address("management_address", "http://127.0.0.1:8081")
            )

        return cls(
            path=path.resolve(),
            inference=address("inference_address", "http://127.0.0.1:8080"),
            management=management(),
            metrics=address("metrics_address", "http://127.0.0.1:8082"),
            exporter=address("exporter_address", "http://127.0.0.1:8083"),
            queue=int(properties.get("job_queue_size", "100")),
            max_body_bytes=int(properties.get("max_request_size", "6553500")),
            request_log=properties.get("request_log", "plain"),
            drain_deadline_s=float(properties.get("drain_deadline_s", "60")),
        )

    def java_memory_bytes(self, worker_clips: int = CPU_BATCH_CLIPS) -> int:
        """How much memory TorchServe's Java may use in its heap, and the same again outside it.

        Enough for the queue, the clips that workers have, as many that are on their way to them and as many that come
        in, all of the largest size: once Java runs out of memory, TorchServe answers no request.
        """
        return max(2**29, 5 * (self.queue + 3 * worker_clips) * self.max_body_bytes // 4)

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Those with a port."""
        management = (self.management,) if isinstance(self.management, Address) else ()
        return (self.inference, *management, self.metrics, self.exporter)


def is_free(address: Address) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError:
            return False
    return True
