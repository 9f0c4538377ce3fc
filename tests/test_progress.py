"""A job says when it will be done once it can know, and not before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import accumulate

import pytest

from etenet.jobs import progress
from etenet.jobs.journal import Record
from etenet.jobs.progress import ESTIMATE_AFTER_CLIPS, Pace, Progress, Summary

LOADING_S = 60.0


@pytest.mark.parametrize("batch", [1, 8, 16])
@pytest.mark.parametrize("clip_s", [0.02, 0.5, 30.0])
def test_an_estimate_is_right_whatever_loading_took_and_however_clips_come(batch: int, clip_s: float) -> None:
    pace, estimates = Pace(), []
    for number in range(400):
        at_s = LOADING_S + clip_s * batch * (1 + number // batch)
        pace.count(at_s)
        left_s = pace.left_s(1000, at_s)
        if number < max(ESTIMATE_AFTER_CLIPS, batch):
            assert left_s is None
        if left_s is not None:
            estimates.append(left_s / (1000 * clip_s))
    # A batch that comes clip by clip is only counted whole with its last one.
    assert all(0.99 < estimate < 1 + batch / ESTIMATE_AFTER_CLIPS + 0.01 for estimate in estimates)
    assert estimates[-1] == pytest.approx(1, abs=0.05)


def test_clips_of_different_lengths_even_out() -> None:
    rng, pace = random.Random(0), Pace()
    times_s = list(accumulate(rng.expovariate(1.0) for _ in range(1000)))
    for at_s in times_s:
        pace.count(LOADING_S + at_s)
    assert pace.left_s(100, LOADING_S + times_s[-1]) == pytest.approx(100, rel=0.1)


def printed(clips: int, capsys: pytest.CaptureFixture[str], *, estimates: bool = True) -> list[str]:
    """The lines of a job of which every clip takes as long as a line is apart from the next."""

    def records() -> Iterator[Record]:
        for number in range(clips):
            yield {"video": str(number), "caption": "one"}

    with Progress(Summary(clips), estimates=estimates) as running:
        for _ in running.count(records()):
            pass
    return capsys.readouterr().err.splitlines()


def test_a_line_has_no_estimate_before_there_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def monotonic() -> float:
        clock[0] += 10
        return clock[0]

    monkeypatch.setattr(progress, "time", type("clock", (), {"monotonic": monotonic}))
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    lines = printed(20, capsys)
    with_estimate = [" left" in line for line in lines]
    assert with_estimate == sorted(with_estimate)
    assert with_estimate.count(False) == ESTIMATE_AFTER_CLIPS
    assert lines[-1].endswith(", 0:00:00 left")
    assert not any(" left" in line for line in printed(20, capsys, estimates=False))


def test_a_name_that_a_terminal_would_obey_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress.say("a\n\x1b[2Jé\udcff 🎬.mp4: cut short")
    assert capsys.readouterr().err == "etenet caption: a\\n\\x1b[2Jé\\udcff 🎬.mp4: cut short\n"
