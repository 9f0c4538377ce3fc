"""Bodies that crashed or hung a decoder, each with how it was cut: they are refused at once for an hour."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from etenet.errors import CaptionError
from etenet.video.segments import WHOLE, Cut

REFUSED_S = 3600.0
MAX_ENTRIES = 10_000  # then the oldest is dropped


@dataclass(frozen=True, slots=True)
class _Verdict:
    at_s: float
    kind: type[CaptionError]
    reason: str


class Quarantine:
    """Bodies by their SHA-256. A body is hashed only if one of the same length is in quarantine."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[tuple[int, bytes], _Verdict] = OrderedDict()

    def add(self, body: bytes, error: CaptionError, cut: Cut = WHOLE) -> None:
        name = _name(body, cut)
        with self._lock:
            self._verdicts[name] = _Verdict(self._clock(), type(error), str(error))
            self._verdicts.move_to_end(name)
            while len(self._verdicts) > MAX_ENTRIES:
                self._verdicts.popitem(last=False)

    def verdict(self, body: bytes, cut: Cut = WHOLE) -> CaptionError | None:
        """The error to refuse the body with; None if it is not in quarantine."""
        with self._lock:
            while self._verdicts and next(iter(self._verdicts.values())).at_s < self._clock() - REFUSED_S:
                self._verdicts.popitem(last=False)
            may_be_here = any(length == len(body) for length, _ in self._verdicts)
        verdict = self._verdicts.get(_name(body, cut)) if may_be_here else None
        if verdict is None:
            return None
        return verdict.kind(f"{verdict.reason}; this very file is refused for an hour after that")


def _name(body: bytes, cut: Cut) -> tuple[int, bytes]:
    return len(body), hashlib.sha256(body).digest() + repr(cut).encode()
