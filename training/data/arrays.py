"""Arrays that are mapped from .npy files: new ones have their place on the disk. Knows nothing of what they hold."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from etenet.errors import UsageError


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
