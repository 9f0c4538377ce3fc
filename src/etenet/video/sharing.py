"""Threads that take work from the thread that has it. Knows no video."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")
_Work = Callable[[Iterable[_T]], _R | None]


@dataclass(frozen=True, slots=True)
class Helpers:
    """So many idle threads of an executor."""

    executor: Executor
    count: int


def shared_out(
    items: Sequence[_T], own: _Work[_T, _R], others: Sequence[_Work[_T, _R]], executor: Executor
) -> list[_R] | None:
    """What this thread and others make of items: each takes the next one when it is done with the one before.

    `own` gets the first item, whatever the others do. Once one raises or returns None, no further item is taken, and
    that is the outcome of all. No thread is at work any more when this returns or raises.
    """
    left = deque(items[1:])

    def of_one(work: _Work[_T, _R], first: Iterable[_T] = ()) -> _R | None:
        result = None
        try:
            result = work(chain(first, _taken_from(left)))
        finally:
            if result is None:
                left.clear()
        return result

    futures = [executor.submit(of_one, work) for work in others]
    try:
        results = [of_one(own, items[:1])]
    finally:
        wait(futures)
    while futures:  # a name for the one that raises would keep it, and all that its thread had, in a reference cycle
        results.append(futures.pop().result())
    whole = [result for result in results if result is not None]
    return whole if len(whole) == len(results) else None


def _taken_from(left: deque[_T]) -> Iterator[_T]:
    with suppress(IndexError):
        while True:
            yield left.popleft()
