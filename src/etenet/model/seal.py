"""A zip file with its own SHA-256 as its comment: what checkpoints and archives are. Knows nothing of the contents.

A zip's own checksums are of its contents only. The seal finds every flipped bit, also in the directory.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
from pathlib import Path
from typing import IO

_SEAL_NAME = b"sha256:"
_SEAL_BYTES = len(_SEAL_NAME) + 2 * hashlib.sha256().digest_size
_PIECE_BYTES = 2**20
# Source: .ZIP File Format Specification (APPNOTE), 4.3.16: the last two bytes are the length of the comment.
_END_WITHOUT_COMMENT = re.compile(b"PK\x05\x06.{16}\0\0\\Z", re.DOTALL)


def seal(zip_file: IO[bytes]) -> None:
    """Seal a complete zip file without a comment, which is open for reading and writing."""
    zip_file.seek(-2, os.SEEK_END)
    zip_file.write(_SEAL_BYTES.to_bytes(2, "little"))
    zip_file.seek(0)
    digest = hashlib.sha256()
    while piece := zip_file.read(_PIECE_BYTES):
        digest.update(piece)
    zip_file.write(_seal(digest))


def sha256_of_whole(path: Path) -> str:
    """Hexadecimal SHA-256 of the file. Raises `ValueError` if it is not as `seal` left it.

    Zip files without a comment, which older versions wrote, must agree with the checksums of their contents.
    """
    with path.open("rb") as file:
        left = file.seek(0, os.SEEK_END) - _SEAL_BYTES
        file.seek(0)
        digest = hashlib.sha256()
        while left > 0 and (piece := file.read(min(left, _PIECE_BYTES))):
            digest.update(piece)
            left -= len(piece)
        expected, end = _seal(digest), file.read()
        digest.update(end)
        if end == expected:
            return digest.hexdigest()
        if not _END_WITHOUT_COMMENT.search(end):
            raise ValueError("bytes of it have changed or are missing")
        try:
            with zipfile.ZipFile(file) as contents:
                wrong = contents.testzip()
        except Exception as error:  # zipfile raises anything for a damaged directory
            raise ValueError(f"its directory is damaged: {error}") from error
        if wrong:
            raise ValueError(f"the checksum of {wrong} is wrong")
    return digest.hexdigest()


def _seal(digest: hashlib._Hash) -> bytes:
    return _SEAL_NAME + digest.hexdigest().encode()
