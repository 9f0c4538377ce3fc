"""A file of `torch.save`, read without torch, which takes seconds and 265 MiB to import.

The file is a zip in which NAME/data.pkl holds the objects, pickled, and NAME/data/N the numbers of storage N. Only
plain values and dense tensors are read, and nothing in a file is run. Source: torch/serialization.py, torch/_utils.py.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

_BFLOAT16 = "bfloat16"  # which NumPy does not have
_STORAGES = {
    **{"DoubleStorage": "<f8", "FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": _BFLOAT16},
    **{"LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "<i1"},
    **{"ByteStorage": "<u1", "BoolStorage": "?"},
}


@dataclass(frozen=True, slots=True)
class _Storage:
    name: str
    kind: str
    count: int


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor in an open file. `offset` and `strides` count numbers of its storage."""

    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    _storage: _Storage
    _file: zipfile.ZipFile

    @property
    def is_floating_point(self) -> bool:
        return self._storage.kind == _BFLOAT16 or np.dtype(self._storage.kind).kind == "f"

    def array(self) -> NDArray[Any]:
        """In its own precision, bfloat16 as float32. `ValueError` if the file does not have all its numbers."""
        dtype = np.dtype("<u2" if self._storage.kind == _BFLOAT16 else self._storage.kind)
        entry = self._file.getinfo(self._storage.name)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != self._storage.count * dtype.itemsize:
            raise ValueError(f"{self._storage.name} has another size than its tensor")
        numbers = np.empty(self._storage.count, dtype)
        with cast("zipfile.ZipExtFile", self._file.open(entry)) as file:
            if file.readinto(numbers.view(np.uint8).data) != numbers.nbytes:
                raise ValueError(f"{self._storage.name} is cut off")
        strides = [stride * dtype.itemsize for stride in self.strides]
        array: NDArray[Any] = np.ndarray(self.shape, dtype, numbers, self.offset * dtype.itemsize, strides)
        if self._storage.kind == _BFLOAT16:
            return (array.astype(np.uint32) << 16).view(np.float32)  # the upper half of a float32
        return array


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The object that was saved, with a `StoredTensor` for each tensor, to be read before the file is closed.

    Raises `pickle.UnpicklingError` for what is not to be read, and anything for a damaged file.
    """
    with zipfile.ZipFile(path) as file:
        (objects,) = [name for name in file.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        folder = objects.removesuffix("data.pkl")
        if f"{folder}byteorder" in file.namelist() and file.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        with file.open(objects) as pickled:
            contents = _Unpickler(pickled, file, folder).load()
        yield contents


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: IO[bytes], file: zipfile.ZipFile, folder: str) -> None:
        super().__init__(pickled)
        self._file, self._folder = file, folder

    def find_class(self, module: str, name: str) -> str | Callable[..., object]:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is neither a plain value nor a dense tensor")

    def persistent_load(self, identity: Any) -> _Storage:
        what, kind, key, _, count = identity
        if what != "storage" or kind not in _STORAGES.values() or type(key) is not str or type(count) is not int:
            raise pickle.UnpicklingError("one of its storages is damaged")
        return _Storage(f"{self._folder}data/{key}", kind, count)

    def _tensor(
        self, storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
    ) -> StoredTensor:
        whole = (offset, *shape, *strides)
        if not all(type(number) is int and number >= 0 for number in whole) or len(shape) != len(strides):
            raise pickle.UnpicklingError("one of its tensors is damaged")
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if type(storage) is not _Storage or (0 not in shape and last >= storage.count):
            raise pickle.UnpicklingError("one of its tensors is damaged")
        return StoredTensor(shape, offset, strides, storage, self._file)
