"""What is remembered of a video that was refused: its digest, for an hour; never its bytes."""

from __future__ import annotations

import gc
import sys

import pytest

from etenet.errors import DecoderCrashed
from etenet.sandbox import quarantine
from etenet.sandbox.quarantine import Quarantine
from tests.conftest import wait_until
from tests.test_decoder_processes import HASTY
from tests.test_sandbox import decoding, error_of


def test_quarantine_ends_after_an_hour_or_when_there_are_too_many_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    quarantined = Quarantine(clock=lambda: now[0])
    quarantined.add(b"bad", DecoderCrashed("it crashed"))
    assert isinstance(quarantined.verdict(b"bad"), DecoderCrashed)
    assert quarantined.verdict(b"bat") is None
    now[0] = quarantine.REFUSED_S + 1
    assert quarantined.verdict(b"bad") is None
    monkeypatch.setattr(quarantine, "MAX_ENTRIES", 2)
    for body in (b"one", b"two", b"six"):
        quarantined.add(body, DecoderCrashed("it crashed"))
    assert [quarantined.verdict(body) is None for body in (b"one", b"two", b"six")] == [True, False, False]


@pytest.mark.parametrize("action", [b"crash", b"report a timeout", b"sleep", b"no video"])
def test_a_refused_clip_is_not_kept(action: bytes) -> None:
    """Neither by its error, nor by the quarantine, nor until the garbage collector runs."""
    body = bytes(bytearray(action))  # one that nothing else refers to
    gc.disable()
    try:
        with decoding(limits=HASTY) as sandbox:
            before = sys.getrefcount(body)
            error = error_of(sandbox, body)
            wait_until(lambda: sys.getrefcount(body) == before, 5)
            assert str(error)
    finally:
        gc.enable()
