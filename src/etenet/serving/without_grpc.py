"""TorchServe's main class without its gRPC servers, which no setting turns off.

They answer errors with the status OK, because TorchServe drops the status that a handler gives, and a call of
StreamPredictions ends the worker. So the class is loaded from a copy in which the method that starts them returns.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from etenet.errors import UsageError

MAIN_CLASS = "org.pytorch.serve.ModelServer"
_CLASS_FILE = f"{MAIN_CLASS.replace('.', '/')}.class"

# startGRPCServers of TorchServe 0.12, compiled: twice `this.field = this.startGRPCServer(ConnectorType.CONSTANT)`, that
# is aload_0, aload_0, getstatic, invokespecial, putfield, and then return. Opcodes: The Java Virtual Machine
# Specification, Java SE 17, chapter 6.
_START = re.compile(rb"(?:\x2a\x2a\xb2..\xb7..\xb5..){2}\xb1", re.DOTALL)
_NOP, _RETURN = b"\x00", b"\xb1"


def write_main_class(jar: Path, folder: Path) -> None:
    """Write the class into `folder`, which must stand before TorchServe's `jar` in the class path.

    Raises `UsageError` if this TorchServe starts gRPC in another way.
    """
    with zipfile.ZipFile(jar) as classes:
        original = classes.read(_CLASS_FILE)
    changed, found = _START.subn(lambda code: _NOP * (len(code[0]) - 1) + _RETURN, original)
    if found != 1:
        raise UsageError(
            f"{jar} is of another TorchServe, whose gRPC would listen; install the one that is supported: "
            "pip install -c constraints.txt torchserve"
        )
    path = folder / _CLASS_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(changed)
