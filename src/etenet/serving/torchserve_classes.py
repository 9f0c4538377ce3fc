"""TorchServe's classes, changed where no setting helps. The copies stand before its jar in the class path.

Each change replaces a sequence of bytes of TorchServe 0.12 that must be there exactly so often. Opcodes and the
constant pool: The Java Virtual Machine Specification, Java SE 17, chapters 6 and 4.4.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from etenet.errors import UsageError

MAIN_CLASS = "org.pytorch.serve.ModelServer"
_REQUESTS = "org.pytorch.serve.http.api.rest.InferenceRequestHandler"

_NOP, _POP, _RETURN = b"\x00", b"\x57", b"\xb1"


def _text(text: str) -> bytes:
    """A string of a constant pool."""
    return b"\x01" + len(text).to_bytes(2, "big") + text.encode()


@dataclass(frozen=True, slots=True)
class Change:
    """`found` becomes what `instead` makes of it; `without` says what TorchServe does otherwise."""

    of_class: str
    without: str
    found: bytes  # a regular expression
    instead: Callable[[bytes], bytes]
    times: int = 1

    @property
    def file(self) -> str:
        return f"{self.of_class.replace('.', '/')}.class"

    def made(self, code: bytes) -> tuple[bytes, int]:
        """The changed code, and how often it was changed."""
        return re.subn(self.found, lambda found: self.instead(found[0]), code, flags=re.DOTALL)


CHANGES = (
    # Its gRPC servers answer errors with the status OK, and a call of StreamPredictions ends the worker. The method
    # that starts them is twice `this.field = this.startGRPCServer(ConnectorType.CONSTANT)` (aload_0, aload_0,
    # getstatic, invokespecial, putfield) and then return.
    Change(
        MAIN_CLASS,
        "gRPC listens",
        rb"(?:\x2a\x2a\xb2..\xb7..\xb5..){2}\xb1",
        lambda code: _NOP * (len(code) - 1) + _RETURN,
    ),
    # curl -T clip.mp4 .../predictions/etenet/ asks for .../predictions/etenet/clip.mp4. The method has
    # `if (segments.length >= 4) modelVersion = segments[3]` (aload_3, arraylength, iconst_4, if_icmplt; aload_3,
    # iconst_3, aaload, astore 5).
    Change(
        _REQUESTS,
        "a name behind that of the model is a version",
        rb"\x2d\xbe\x07\xa1\x00\x08\x2d\x06\x32\x3a\x05",
        lambda code: code[:6] + _NOP * (len(code) - 6),
    ),
    # curl --data-binary and urllib declare every body a form. Its parser then throws, or takes all memory for a million
    # fields. Here it looks twice for the other kind of forms instead.
    Change(
        _REQUESTS,
        "a body that is declared a URL-encoded form is parsed as one",
        re.escape(_text("APPLICATION_X_WWW_FORM_URLENCODED")),
        lambda _: _text("MULTIPART_FORM_DATA"),
    ),
    # It sets this header of every response to an id of its own. The handler sets it to the client's, if there is one.
    Change(
        "org.pytorch.serve.util.NettyUtils",
        "a response cannot have the client's X-Request-Id",
        re.escape(_text("x-request-id")),
        lambda _: _text("x-torchserve-request-id"),
    ),
    # If a worker ends while its thread waits for more requests of a batch, the thread is interrupted and forgets those
    # that it has taken: they are never answered. `aggregator.sendError(null, ...)` puts them back into the queue, but
    # is called only `if (this.req != null)` (aload_0, getfield, ifnull; aload_0, getfield, aload_0, getfield, ldc_w,
    # iload_2, invokevirtual), at each way out of the thread's loop.
    Change(
        "org.pytorch.serve.wlm.WorkerThread",
        "requests are lost when a worker ends",
        rb"\x2a\xb4(..)\xc6\x00\x12\x2a\xb4..\x2a\xb4\1\x13..\x1c\xb6..",
        lambda code: code[:4] + _POP + 2 * _NOP + code[7:],
        times=7,
    ),
)


def write_classes(jar: Path, folder: Path) -> None:
    """Write the classes into `folder`, which must stand before TorchServe's `jar` in the class path.

    Raises `UsageError` if this TorchServe is another one.
    """
    changed: dict[str, bytes] = {}
    with zipfile.ZipFile(jar) as classes:
        for change in CHANGES:
            if change.file not in changed:
                changed[change.file] = classes.read(change.file) if change.file in classes.namelist() else b""
            changed[change.file], found = change.made(changed[change.file])
            if found != change.times:
                raise UsageError(
                    f"{jar} is of another TorchServe, in which {change.without}; install the one that is supported: "
                    "pip install torchserve==0.12.0"
                )
    for file, code in changed.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(code)
