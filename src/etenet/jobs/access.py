"""How a client reaches a server: at which URL, and by the environment with which key, and through which proxy."""

from __future__ import annotations

import ipaddress
import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from etenet.errors import UsageError

KEY_VARIABLE = "ETENET_SERVER_KEY"
PATH = "/predictions/etenet"

_DISCARD_PORT = 9  # RFC 863; nothing is sent there


def predictions_of(url: str) -> str:
    """The URL at which a server captions. Raises `UsageError` if `url` cannot be that of a server."""
    if not _may_be_of_a_server(url):
        raise UsageError(f"--server must look like http://localhost:8080, got {url!r}")
    return url.rstrip("/") + PATH


def _may_be_of_a_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        is_address = bool(parts.hostname) and parts.port != 0 and not any(map(str.isspace, url))
    except ValueError:  # an address in IPv6, or a port, that is none
        return False
    return is_address and parts.scheme in ("http", "https")


def authorization() -> dict[str, str]:
    """The header for a server that wants a key, if there is one in the environment. Raises `UsageError`."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(
            f"{KEY_VARIABLE} has characters that no header can have, such as quotes of a text; copy it again"
        )
    return {"Authorization": f"Bearer {key}"} if key else {}


def proxy_to(url: str) -> str | None:
    """The URL of the proxy that http_proxy, https_proxy or else all_proxy (also in capitals) name for a server.

    None without one, for hosts in no_proxy, and for this machine. Raises `UsageError` if it is not a proxy for HTTP.
    """
    parts = urlsplit(url)
    host, at = parts.hostname or "", parts.netloc.rpartition("@")[2]
    named = getproxies()
    proxy = named.get(parts.scheme) or named.get("all")
    if not proxy or is_this_machine(host) or proxy_bypass(at):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if (kind := urlsplit(proxy).scheme) not in ("http", "https"):
        raise UsageError(
            f"the environment names a {kind} proxy for {host}, but only HTTP proxies can be used; "
            f"set {parts.scheme}_proxy to one, or no_proxy={host}"
        )
    return proxy


def is_this_machine(host: str) -> bool:
    """Whether the host of a URL is a name or an address of this machine. Asks no name server."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.lower().rstrip(".")
        return name == "localhost" or name.endswith(".localhost") or name == socket.gethostname().lower()
    if address.is_loopback or address.is_unspecified:
        return True
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, _DISCARD_PORT))  # only looks up the route: to itself, both ends have one address
            return bool(ipaddress.ip_address(probe.getsockname()[0]) == address)
    except OSError:
        return False
