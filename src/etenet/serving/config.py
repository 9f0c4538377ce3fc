"""The settings that `etenet serve` reads from config.properties, and those it hands to workers. Imports no torch."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from etenet.assets import bundled
from etenet.errors import UsageError
from etenet.linux import CORES_VARIABLE
from etenet.runtime import CPU_BATCH_CLIPS
from etenet.serving.loopback import Address, SocketFile
from etenet.serving.properties import meant, number, parsed, text_of, whole_numbers

FAILURE_FILE_VARIABLE = "ETENET_FAILURE_FILE"  # the file in which a worker writes why it cannot start
PROBE_SECRET_VARIABLE = "ETENET_PROBE_SECRET"  # what marks the server's own test clip, other at each start
PROBE_HEADER = "Etenet-Probe"  # of a request: that secret
REQUEST_LOG_VARIABLE = "ETENET_REQUEST_LOG"
CORS_VARIABLE = "ETENET_CORS_ALLOWED_ORIGIN"
REQUEST_LOGS = ("plain", "json", "off")

CONFIG_FILE = "config.properties"
PORTS = {"inference": 8080, "management": 8081, "metrics": 8082, "exporter": 8083}

_PREFIX = "ETENET_"  # of the variables that change settings; Kubernetes names its own so after a service etenet
_OF_KUBERNETES = re.compile(r"(^|_)(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_\w+)?)$")

_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[a-z0-9._:\[\]-]+")  # as browsers write theirs. Source: RFC 6454, 6.2


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """The settings that `etenet serve` uses. TorchServe reads `text` for its own.

    Those of its gRPC (`grpc_*`) have no effect: see `torchserve_classes`.
    """

    path: Path
    text: str  # the file, then what else changes it: of a setting that is there twice, TorchServe takes the last
    inference: Address
    management: Address | SocketFile | None  # None: a socket file in TorchServe's own folder
    metrics: Address  # TorchServe's own
    exporter: Address
    queue: int  # how many requests may wait
    max_body_bytes: int
    request_log: str  # json, plain or off
    cors_allowed_origin: str  # * for all; empty for none
    drain_deadline_s: float  # how long a shutdown waits for accepted requests

    @classmethod
    def read(
        cls,
        path: Path,
        environment: Mapping[str, str] = MappingProxyType({}),
        *,
        host: str | None = None,
        port: int | None = None,
    ) -> ServerConfig:
        """A file, changed by variables (`from_environment`), then by `host` and `port`, where captions are to be had.

        The other ports keep their distance from that one. Raises `UsageError`.
        """
        if not path.is_file():
            raise UsageError(f"no configuration at {path}; give one with --config, or none: etenet brings its own")
        text, shipped = text_of(path), bundled(CONFIG_FILE)
        properties = parsed(path, text)
        known = {"management_address": ""} | parsed(shipped, text_of(shipped)) | properties
        changes = from_environment(known, environment)
        properties |= changes

        def address(name: str) -> Address:
            text = properties.get(f"{name}_address", f"http://127.0.0.1:{PORTS[name]}")
            try:
                url = urlsplit(text)
                if url.scheme != "http" or not url.hostname:
                    raise ValueError("no URL of HTTP with a host")
                return Address(url.hostname, url.port or 80)
            except ValueError as error:
                example = f"http://127.0.0.1:{PORTS[name]}"
                raise UsageError(f"{path}: {name}_address must look like {example}, got {text!r}") from error

        given = properties.get("management_address", "" if sys.platform == "linux" else "http://127.0.0.1:8081")
        scheme, _, file = given.partition(":")
        socket_file = SocketFile(Path(file)) if scheme == "unix" else None
        has_port = bool(given) and not socket_file
        addresses = {name: address(name) for name in PORTS if name != "management" or has_port}
        if host or port:
            addresses = _moved(addresses, host, port)
            changes |= {f"{name}_address": f"http://{moved.host}:{moved.port}" for name, moved in addresses.items()}
        for (one, its), (other, theirs) in combinations(addresses.items(), 2):
            if _collide(its, theirs) and (
                its != theirs or "exporter" in (one, other)
            ):  # TorchServe shares its own ports
                raise UsageError(
                    f"{path}: {one}_address and {other}_address have the same port {its.port}; give one of them another"
                )
        request_log = properties.get("request_log", "plain")
        if request_log not in REQUEST_LOGS:
            raise UsageError(f"{path}: request_log must be {', '.join(REQUEST_LOGS)}, got {request_log!r}")
        origin = properties.get("cors_allowed_origin", "")
        if origin and not _ORIGIN.fullmatch(origin):
            raise UsageError(
                f"{path}: cors_allowed_origin must be an origin as browsers write it, such as https://app.example.org "
                f"without a slash at its end, or * for all, or empty for none; got {origin!r}"
            )
        numbers = whole_numbers(path, properties)
        return cls(
            path=path.resolve(),
            text="\n".join([text, *(f"{key}={value}" for key, value in changes.items()), ""]),
            inference=addresses["inference"],
            management=addresses.get("management", socket_file),
            metrics=addresses["metrics"],
            exporter=addresses["exporter"],
            queue=numbers.get("job_queue_size", 100),
            max_body_bytes=numbers.get("max_request_size", 6553500),
            request_log=request_log,
            cors_allowed_origin=origin,
            drain_deadline_s=number(path, properties, "drain_deadline_s", 60),
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


def request_log(path: Path, environment: Mapping[str, str]) -> str:
    """Of a file and its variables: found out first, so that what is wrong with them is logged in this form, too."""
    text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    in_file = re.findall(r"^\s*request_log\s*=\s*(\S+)", text, re.MULTILINE)
    return environment.get(REQUEST_LOG_VARIABLE) or (in_file[-1] if in_file else "plain")


def from_environment(settings: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings that variables change.

    ETENET_JOB_QUEUE_SIZE is `job_queue_size`, ETENET_BATCH_SIZE `batchSize`, ETENET_GPU_WORKERS `workers` under `gpu`;
    those under `etenet` have no further word. An empty variable changes nothing. Raises `UsageError`, also for a
    variable whose name is nearly one of these.
    """
    words = {name.removeprefix(_PREFIX).lower() for name in (*_names(settings), CORES_VARIABLE)}
    for variable, text in environment.items():
        word = variable.removeprefix(_PREFIX)
        if text and word != variable and not _OF_KUBERNETES.search(word) and (other := meant(word.lower(), words)):
            raise UsageError(f"no setting is called {variable}; write {_PREFIX}{other.upper()}, or unset it")
    return _changes(settings, environment)


def _names(settings: Mapping[str, Any], prefix: str = _PREFIX) -> Iterator[str]:
    for key, value in settings.items():
        name = _name(key, prefix)
        if isinstance(value, Mapping):
            yield from _names(value, prefix if key == "etenet" else f"{name}_")
        else:
            yield name


def _name(key: str, prefix: str) -> str:
    return prefix + re.sub("(?=[A-Z])", "_", key).upper()


def _changes(settings: Mapping[str, Any], environment: Mapping[str, str], prefix: str = _PREFIX) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for key, value in settings.items():
        name = _name(key, prefix)
        if isinstance(value, Mapping):
            if inside := _changes(value, environment, prefix if key == "etenet" else f"{name}_"):
                changes[key] = {**value, **inside}
        elif text := environment.get(name):
            try:
                changes[key] = type(value)(text)
            except ValueError as error:
                raise UsageError(f"{name} must be a number like {value}, got {text!r}") from error
    return changes


def _moved(addresses: Mapping[str, Address], host: str | None, port: int | None) -> dict[str, Address]:
    """Captions on another host, with the exporter where it shares theirs; the ports as far from theirs as before."""
    captions, exporter = addresses["inference"], addresses["exporter"]
    distance = port - captions.port if port else 0
    moved = {name: Address(address.host, address.port + distance) for name, address in addresses.items()}
    if host:
        moved["inference"] = Address(host, moved["inference"].port)
        if exporter.host == captions.host:
            moved["exporter"] = Address(host, moved["exporter"].port)
    if bad := [address.port for address in moved.values() if not 0 < address.port < 2**16]:
        raise UsageError(f"--port {port} would make another port {bad[0]}; give one between 1 and 65,532")
    return moved


def _collide(one: Address, other: Address) -> bool:
    return one.port == other.port and (one.host == other.host or "0.0.0.0" in (one.host, other.host))


def unusable(addresses: Sequence[Address]) -> tuple[str, str] | None:
    """Why nothing can listen on one of the addresses, and how to fix that."""
    if unknown := [each.host for each in addresses if _fault(Address(each.host, 0))]:
        return f"{unknown[0]} is no IPv4 address of this machine", "give one, or 0.0.0.0 for all"
    faults = {address.port: fault for address in addresses if (fault := _fault(address))}
    if forbidden := [port for port, fault in faults.items() if isinstance(fault, PermissionError)]:
        return f"only root may listen on port {forbidden[0]}", "give one from 1024 on with --port; nginx can pass 80 on"
    if faults:
        taken = f"port {min(faults)} is" if len(faults) == 1 else f"ports {', '.join(map(str, faults))} are"
        return f"{taken} taken", "stop the program that uses it, or give another with --port"
    return None


def _fault(address: Address) -> OSError | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            return error
    return None
