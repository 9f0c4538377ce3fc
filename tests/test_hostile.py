"""Hostile files: each gets a caption or a reason, no decoder dies, and no file opens another file or a connection.

`--hostile` runs the long form.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import numpy as np
import psutil
import pytest

from etenet.errors import CaptionError
from etenet.sandbox import pool
from etenet.sandbox.pool import InProcess
from etenet.video.clip import Clip
from etenet.video.limits import DecodeLimits
from tests.hostile import HostileFile, hostile_files, playlists
from tests.hostile.alarm import Alarm
from tests.hostile.damage import containers, flipped
from tests.test_sandbox import decoding

LIMITS = DecodeLimits(decode_deadline_s=120.0)  # other work on this machine changes no outcome
RESERVED_AT_START_BYTES = 64 * 2**20


def outcome(file: HostileFile, future: Future[list[Clip]]) -> str:
    """Gives "accept", "reject", or the name of the file with an error that is neither."""
    error = future.exception(timeout=300)
    if error is None:
        return "accept"
    return "reject" if isinstance(error, CaptionError) and error.status < 500 else f"{file.name}: {error!r}"


def test_every_file_gets_the_expected_outcome_and_no_decoder_dies(alarm: Alarm) -> None:
    files = list(hostile_files(alarm.trap))
    assert len({file.name for file in files}) == len(files) >= 250
    with decoding("etenet.sandbox.worker:main", LIMITS, processes=2) as sandbox:
        decoders = sandbox.pids
        futures = [sandbox.submit(file.body) for file in files]
        outcomes = {file.name: outcome(file, future) for file, future in zip(files, futures, strict=True)}
        assert sandbox.pids == decoders
        for pid in decoders:
            assert peak_bytes(pid) < LIMITS.max_memory_bytes + RESERVED_AT_START_BYTES
    wrong = {file.name: outcomes[file.name] for file in files if outcomes[file.name] not in allowed_outcomes(file)}
    assert not wrong
    assert not alarm.triggered()


def allowed_outcomes(file: HostileFile) -> set[str]:
    return {"accept", "reject"} if file.expected == "either" else {file.expected}


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


DEFENCES = {
    "both": "etenet.sandbox.worker:main",
    "only the allow-lists": "tests.misbehaving:unfiltered_main",
    "only the sandbox": "tests.misbehaving:no_allow_lists_main",
}


@pytest.mark.parametrize("defence", DEFENCES)
def test_each_defence_alone_keeps_files_from_touching_the_trap(alarm: Alarm, defence: str) -> None:
    with decoding(DEFENCES[defence], DecodeLimits(decode_deadline_s=2.0)) as sandbox:
        for file in playlists.files(alarm.trap):
            sandbox.submit(file.body).exception()
            assert not alarm.triggered(), file.name


def test_without_any_defence_the_trap_is_touched(alarm: Alarm) -> None:
    touched = []
    with decoding("tests.misbehaving:undefended_main", DecodeLimits(decode_deadline_s=2.0)) as undefended:
        for file in playlists.files(alarm.trap):
            undefended.submit(file.body).exception()
            if alarm.triggered():
                touched.append(file.name)
    assert "ffconcat of a file" in touched
    assert any("address" in name for name in touched)


def test_allow_lists_hold_without_a_sandbox(alarm: Alarm) -> None:
    plain = InProcess(resize_px=64)
    for file in playlists.files(alarm.trap):
        assert outcome(file, plain.submit(file.body)) in allowed_outcomes(file)
        assert not alarm.triggered(), file.name


def test_mutated_clips_kill_no_decoder(thorough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "CLIPS_PER_PROCESS", 1_000_000)
    count, rng = 100_000 if thorough else 1_000, np.random.default_rng(1)
    seeds = list(containers().values())
    with decoding("etenet.sandbox.worker:main", LIMITS, processes=2) as sandbox:
        decoders = sandbox.pids
        for number in range(0, count, 100):
            mutants = [mutant(seeds[rng.integers(len(seeds))], rng) for _ in range(number, number + 100)]
            futures = [sandbox.submit(body) for body in mutants]
            errors = [future.exception() for future in futures]
            assert all(error is None or isinstance(error, CaptionError) for error in errors)
            assert all(error.status < 500 for error in errors if isinstance(error, CaptionError))
        assert sandbox.pids == decoders


def mutant(whole: bytes, rng: np.random.Generator) -> bytes:
    """The file with bits flipped, a piece cut out, doubled, blanked or replaced by a piece of itself."""
    start, other = sorted(int(place) for place in rng.integers(len(whole), size=2))
    end = min(other, start + 4096)
    piece = whole[start:end]
    match int(rng.integers(6)):
        case 0:
            return whole[:start] + whole[end:]
        case 1:
            return whole[:end] + piece * int(rng.integers(1, 50)) + whole[end:]
        case 2:
            return whole[:start] + bytes([int(rng.choice([0, 255]))]) * len(piece) + whole[end:]
        case 3:
            place = int(rng.integers(len(whole)))
            return whole[:place] + piece + whole[place + len(piece) :]
        case _:
            return flipped(whole, rng, 2 ** int(rng.integers(8)))


@pytest.mark.long
def test_processes_do_not_grow_over_many_clips(alarm: Alarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "CLIPS_PER_PROCESS", 1_000_000)
    rounds = 5
    files = [file.body for file in hostile_files(alarm.trap)]
    here = psutil.Process()
    with decoding("etenet.sandbox.worker:main", LIMITS, processes=1) as sandbox:
        (decoder,) = map(psutil.Process, sandbox.pids)

        def decode_all() -> tuple[tuple[int, int, int], tuple[int, int]]:
            for future in [sandbox.submit(body) for body in files]:
                future.exception()
            counts = here.num_fds(), here.num_threads(), decoder.num_fds()
            return counts, (here.memory_info().rss, decoder.memory_info().rss)

        decode_all()
        counts, memory = decode_all()
        for _ in range(rounds):
            counts_after, memory_after = decode_all()
    assert counts_after == counts
    for before, after in zip(memory, memory_after, strict=True):
        assert after - before < 32 * 2**20
