"""Arrays that are mapped from .npy files: new ones have their place on the disk, damaged ones are named.

Knows nothing of what they hold.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from etenet.errors import UsageError

COPY_AGAIN = "copy it again or prepare it again"
COMPUTE_AGAIN = "delete it: it is then computed again"


def new_array(file: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[Any]]:
    """Zeros, mapped from a new file. Raises `UsageError` if the disk has no room for all of them.

    The kernel kills a process that writes to a map for which the disk has no room. So the file is no sparse one.
    """
    try:
        array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        with file.open("r+b") as allocated:
            os.posix_fallocate(allocated.fileno(), 0, file.stat().st_size)
    except OSError as error:
        file.unlink(missing_ok=True)
        size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        raise UsageError(
            f"cannot write {file}, which needs {size_bytes / 1e9:.1f} GB: {error.strerror}; make room, or name another "
            "folder with --out"
        ) from error
    return array


def mapped(file: Path, *, fix: str = COPY_AGAIN) -> NDArray[Any]:
    """Read-only. Raises `UsageError` if the file is damaged or shorter than its header says, and `OSError`."""
    try:
        return np.lib.format.open_memmap(file, mode="r")
    except OSError:
        raise
    except Exception as error:  # NumPy raises many kinds for damaged headers
        raise damaged(file, fix) from error


def damaged(file: Path, fix: str = COPY_AGAIN) -> UsageError:
    return UsageError(f"{file} is damaged or cut off; {fix}")
