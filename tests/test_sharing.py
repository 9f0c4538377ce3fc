"""Threads that help to decode a clip change nothing about it but how long it takes, and no limit on it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from etenet.errors import CaptionError, DecodeTimeout, TooManyPixels, TooMuchMemory
from etenet.sandbox.pool import MOST_HELPERS, Sandbox, _Share
from etenet.video.clip import Clip
from etenet.video.decoder import Decoder
from etenet.video.film import Film
from etenet.video.limits import DecodeLimits, Stopwatch
from etenet.video.sampling import sample_frames, sample_segments
from etenet.video.segments import Cut
from etenet.video.sharing import Helpers, shared_out
from tests import clips
from tests.conftest import wait_until
from tests.test_sandbox import LIMITS, decoding, error_of

SIZE_PX = 64


class Eager(Executor):
    """A thread that is never late: what it is given is done before the one that gives it goes on."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments, **named))
        except Exception as error:
            future.set_exception(error)
        return future


EAGER = Helpers(Eager(), 1)  # takes all runs of a clip but the first

FILM = clips.video(120, g="12", bf="2", sc_threshold="0")


def assert_same(clips_: Iterable[Clip], others: Iterable[Clip]) -> None:
    for one, other in zip(clips_, others, strict=True):
        np.testing.assert_array_equal(one.frames, other.frames)
        assert replace(one.info, decode_ms=0) == replace(other.info, decode_ms=0)


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> list[Decoder]:
    """The decoders that helpers got."""
    another, given = Film.another_decoder, []

    def noted(film: Film) -> Decoder | None:
        given.append(another(film))
        return given[-1]

    monkeypatch.setattr(Film, "another_decoder", noted)
    return given


@pytest.mark.parametrize("cut", [Cut(), Cut(segment_s=1.1), Cut(segment="scenes"), Cut(start_s=2.2)])
@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_clip_is_the_same_with_helpers(cut: Cut, threads: int, decoders: list[Decoder]) -> None:
    with ThreadPoolExecutor(max(1, threads)) as executor:
        helpers = Helpers(executor, threads) if threads else EAGER
        helped = sample_segments(FILM, cut, resize_px=SIZE_PX, helpers=helpers)
    assert len(decoders) == helpers.count
    assert_same(helped, sample_segments(FILM, cut, resize_px=SIZE_PX))


def joined_flv(first: bytes, second: bytes, second_starts_ms: int) -> bytes:
    """As a recorder writes it whose encoder starts anew: what it says about its pictures changes on the way."""
    tags, at = bytearray(), 13
    while at < len(second):
        size, of_tag = int.from_bytes(second[at + 1 : at + 4]), bytearray(second[at : at + 11])
        time_ms = int.from_bytes(bytes([of_tag[7], *of_tag[4:7]])) + second_starts_ms
        of_tag[7], of_tag[4:7] = time_ms >> 24, (time_ms & 0xFFFFFF).to_bytes(3)
        if of_tag[0] == 9:  # a picture, or what is said about them
            tags += of_tag + second[at + 11 : at + 15 + size]
        at += 15 + size
    return first + tags


def test_a_header_that_changes_on_the_way_is_seen_by_whoever_decodes_what_follows(decoders: list[Decoder]) -> None:
    """The second half has another form of entropy coding, and says so once."""
    halves = [clips.video(40, container="flv", g="8", bf="0", sc_threshold="0", coder=coder) for coder in ("1", "0")]
    body = joined_flv(halves[0], halves[1], 1600)
    helped = sample_frames(body, resize_px=SIZE_PX, helpers=EAGER)
    assert_same([helped], [sample_frames(body, resize_px=SIZE_PX)])
    assert helped.info.distinct_frames == 16
    assert not decoders


FLAWED = {
    "a flag of fields that the header does not announce": clips.video(60, g="12", fields="tff", flags="+ildct"),
    "a turned picture": clips.with_display_matrix(FILM, (0, 1, -1, 0)),
    "cut short": clips.video(60, container="mpegts", g="12")[:-1000],
    "no times of presentation": clips.video(60, codec="mpeg4", container="avi", g="10", bf="2"),
}


@pytest.mark.parametrize("name", FLAWED)
def test_a_flawed_clip_is_the_same_with_helpers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("a flag"):
        monkeypatch.setattr("etenet.video.decoder.FIELD_ORDERS", frozenset())
    alone = sample_frames(FLAWED[name], resize_px=SIZE_PX)
    assert_same([sample_frames(FLAWED[name], resize_px=SIZE_PX, helpers=EAGER)], [alone])


def test_damage_in_any_run_gives_the_same_with_helpers() -> None:
    body, random = clips.video(60, codec="mpeg4", container="avi", g="10"), np.random.default_rng(0)
    start = body.index(b"movi")
    compared = 0
    for _ in range(20):
        damaged = bytearray(body)
        for at in random.integers(start + 1000, len(body) - 2000, 3):
            damaged[at : at + 20] = bytes(20)
        try:
            alone = sample_frames(bytes(damaged), resize_px=SIZE_PX)
        except CaptionError as error:
            with pytest.raises(type(error)):
                sample_frames(bytes(damaged), resize_px=SIZE_PX, helpers=EAGER)
            continue
        assert_same([sample_frames(bytes(damaged), resize_px=SIZE_PX, helpers=EAGER)], [alone])
        compared += 1
    assert compared > 10


@pytest.mark.parametrize(("times", "count"), [(1, 0), (2, 1), (3, 2)])
def test_all_decoders_together_hold_no_more_pixels_than_one_may(
    times: int, count: int, decoders: list[Decoder]
) -> None:
    body, limits = clips.video(60, size=(128, 64), g="12"), DecodeLimits(max_pixels=times * 128 * 64)
    sample_frames(body, resize_px=SIZE_PX, limits=limits, helpers=Helpers(Eager(), 3))
    assert len(decoders) == count


def test_without_memory_for_another_decoder_one_decodes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Film) -> Decoder:
        raise MemoryError

    monkeypatch.setattr(Film, "another_decoder", fails)
    helped = sample_frames(FILM, resize_px=SIZE_PX, helpers=EAGER)
    assert_same([helped], [sample_frames(FILM, resize_px=SIZE_PX)])


def test_what_a_helper_finds_wrong_is_wrong_with_the_clip(
    decoders: list[Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = Decoder._check_pixels

    def as_if_later_pictures_were_larger(self: Decoder, width: int, height: int) -> None:
        checked(self, width * (1000 if self in decoders else 1), height * 1000)

    monkeypatch.setattr(Decoder, "_check_pixels", as_if_later_pictures_were_larger)
    limits = DecodeLimits(max_pixels=10_000 * 96 * 64)
    assert sample_frames(FILM, resize_px=SIZE_PX, limits=limits).info.width_px == 96
    with pytest.raises(TooManyPixels):
        sample_frames(FILM, resize_px=SIZE_PX, limits=limits, helpers=EAGER)


def test_where_pyav_makes_no_other_decoder_one_decodes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = sample_frames(FILM, resize_px=SIZE_PX)
    monkeypatch.setattr(Film, "another_decoder", lambda _: None)
    assert_same([sample_frames(FILM, resize_px=SIZE_PX, helpers=EAGER)], [alone])


def test_the_processor_time_of_all_threads_counts() -> None:
    limits, of_thread, of_process = DecodeLimits(decode_cpu_s=0.05), Stopwatch(), Stopwatch(of_process=True)
    burning = threading.Thread(target=_burn, args=(0.1,))
    burning.start()
    burning.join()
    of_thread.check(limits)
    with pytest.raises(DecodeTimeout):
        of_process.check(limits)


def _burn(seconds: float) -> None:
    ends_s = time.thread_time() + seconds
    while time.thread_time() < ends_s:
        pass


def test_each_item_is_taken_once_and_the_first_by_the_thread_that_has_them() -> None:
    firsts: list[int] = []

    def own(items: Iterable[int]) -> list[int]:
        taken = list(items)
        firsts.append(taken[0])
        return taken

    with ThreadPoolExecutor(3) as executor:
        for count in range(1, 50):
            parts = shared_out(range(count), own, [list] * 3, executor)
            assert parts is not None
            assert sorted(item for part in parts for item in part) == list(range(count))
    assert set(firsts) == {0}


@pytest.mark.parametrize("failing", ["own", "other"])
@pytest.mark.parametrize("raises", [True, False])
def test_once_one_fails_no_further_item_is_taken_and_nobody_works_on(failing: str, raises: bool) -> None:
    at_work, taken_by_the_other, both_began = [0], [0], threading.Barrier(2)

    def works(items: Iterable[int]) -> list[int] | None:
        at_work[0] += 1
        begun = iter(items)
        taken = [next(begun)]
        both_began.wait(10)
        failed.wait(10)
        taken += begun
        taken_by_the_other[0] = len(taken)
        _burn(0.05)
        at_work[0] -= 1
        return taken

    def fails(items: Iterable[int]) -> list[int] | None:
        next(iter(items))
        both_began.wait(10)
        failed.set()
        if raises:
            raise ZeroDivisionError
        return None

    failed = threading.Event()
    own, other = (fails, works) if failing == "own" else (works, fails)
    with ThreadPoolExecutor(1) as executor:
        if raises:
            with pytest.raises(ZeroDivisionError):
                shared_out(range(10**6), own, [other], executor)
        else:
            assert shared_out(range(10**6), own, [other], executor) is None
        assert at_work == [0]
    assert 1 <= taken_by_the_other[0] < 10**6 - 1


def test_the_cores_of_a_pool_are_shared_by_its_videos() -> None:
    share, videos = _Share(8), [Future[list[Clip]]() for _ in range(9)]
    helpers = []
    for video in videos:
        share.enter(video)
        helpers.append(share.helpers)
    assert helpers == [MOST_HELPERS, MOST_HELPERS, 1, 1, 0, 0, 0, 0, 0]
    for video in videos[:-2]:
        video.set_result([])
    assert share.helpers == MOST_HELPERS
    assert _Share(1).helpers == 0


def test_in_the_sandbox_helpers_decode_the_same_frames_behind_the_filter() -> None:
    """Four processes: the only video of the pool gets three helpers; each of four gets none."""
    sandbox = Sandbox(resize_px=SIZE_PX, limits=LIMITS, processes=4, entry="tests.misbehaving:main")
    try:
        assert sandbox.filter_fault is None
        assert str(error_of(sandbox, b"count helpers")) == "3 helpers"
        alone = sample_segments(FILM, Cut(), resize_px=SIZE_PX)
        for _ in range(4):
            assert_same(sandbox.submit(FILM).result(), alone)
        for future in [sandbox.submit(FILM) for _ in range(8)]:
            assert_same(future.result(), alone)
    finally:
        sandbox.close()


def test_the_limits_hold_for_helpers() -> None:
    with decoding(processes=2) as sandbox:

        def error(action: bytes) -> CaptionError:
            wait_until(lambda: sandbox._share.helpers == 1, 10)
            return error_of(sandbox, b"in a helper: " + action)

        for action in (b"open", b"make a socket", b"fork"):
            assert str(error(action)) == "denied: Operation not permitted"
        pids = sandbox.pids
        assert isinstance(error(b"use up memory"), TooMuchMemory)
        assert sandbox.pids == pids
        assert isinstance(error(b"spin"), DecodeTimeout)
        assert "refused for an hour" in str(error(b"spin"))
