"""Which bodies, cut how, crashed or hung a decoder, so that they are refused at once for a while."""

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
REMEMBERED = 10_000  # bodies, oldest forgotten first


@dataclass(frozen=True, slots=True)
class _Verdict:
    at_s: float
    error: CaptionError


class Poison:
    """Bodies by their SHA-256. Only a body as long as a remembered one is hashed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[tuple[int, bytes], _Verdict] = OrderedDict()

    def remember(self, body: bytes, error: CaptionError, cut: Cut = WHOLE) -> None:
        name = _name(body, cut)
        with self._lock:
            self._verdicts[name] = _Verdict(self._clock(), error)
            self._verdicts.move_to_end(name)
            while len(self._verdicts) > REMEMBERED:
                self._verdicts.popitem(last=False)

    def verdict(self, body: bytes, cut: Cut = WHOLE) -> CaptionError | None:
        """The error to refuse the body with, if it is known."""
        with self._lock:
            while self._verdicts and next(iter(self._verdicts.values())).at_s < self._clock() - REFUSED_S:
                self._verdicts.popitem(last=False)
            suspect = any(length == len(body) for length, _ in self._verdicts)
        known = self._verdicts.get(_name(body, cut)) if suspect else None
        if known is None:
            return None
        return type(known.error)(f"{known.error}; this very file is refused for an hour after that")


def _name(body: bytes, cut: Cut) -> tuple[int, bytes]:
    return len(body), hashlib.sha256(body).digest() + repr(cut).encode()
