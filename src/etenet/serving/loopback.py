"""HTTP requests to this machine: past every proxy, to a port or to a socket file.

A socket file, other than a port, has an owner: only this user and root can connect to it.
"""

from __future__ import annotations

import socket
import urllib.request
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from urllib.parse import quote, unquote


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int

    @property
    def url(self) -> str:
        """The URL by which this machine reaches the address."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class SocketFile:
    path: Path

    @property
    def url(self) -> str:
        """For `WITHOUT_PROXY`."""
        return f"unix://{quote(str(self.path), safe='')}"


class _Connection(HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(unquote(self.host))


class _SocketFileHandler(urllib.request.AbstractHTTPHandler):
    def unix_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_Connection, request)


# Whatever proxies the environment names.
WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}), _SocketFileHandler())
