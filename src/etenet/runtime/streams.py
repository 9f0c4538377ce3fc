"""How many frames an encoder computes at the same time: measured once for a network and a processor.

A core for each frame wastes least, because no core waits for another. But a clip has 16 frames: where there are more
cores, several compute a frame together, and how many is best depends on the processor. `etenet package` measures it,
and the outcome is kept where other things are that can be made again. Where nothing is kept, as many frames are
computed at a time as there are cores, up to a whole clip.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from etenet.files import cache_folder, replacing

CLIP_FRAMES = 16
WORTH_A_CHANGE = 0.95  # of the time with the default, or the difference may be noise
ROUNDS = 3


def streams(graph: Path, threads: int, processor: str) -> int:
    """How many frames the encoder of this file computes at a time."""
    with suppress(OSError, ValueError):
        if 1 <= (kept := int(_file(graph, threads, processor).read_text())) <= threads:
            return kept
    return default(threads)


def default(threads: int) -> int:
    return min(threads, CLIP_FRAMES)


def measure(graph: Path, threads: int, processor: str, prepare: Callable[[int], Callable[[], object]]) -> None:
    """Keep the fastest number of streams. `prepare` makes for a number of them what encodes a clip."""
    numbers = [default(threads)]
    while numbers[-1] > 1:
        numbers.append(numbers[-1] // 2)
    encoders = {number: prepare(number) for number in numbers}
    seconds = dict.fromkeys(numbers, float("inf"))
    for _ in range(ROUNDS):
        for number, encode in encoders.items():
            began_s = time.perf_counter()
            encode()
            seconds[number] = min(seconds[number], time.perf_counter() - began_s)
    best = min(numbers, key=seconds.__getitem__)
    if seconds[best] > WORTH_A_CHANGE * seconds[numbers[0]]:
        best = numbers[0]
    with suppress(OSError), replacing(_file(graph, threads, processor)) as file:
        file.write(b"%d" % best)


def _file(graph: Path, threads: int, processor: str) -> Path:
    """One for networks that differ only in their weights, which are not in the graph's own file."""
    digest = sha256(f"{threads} threads of {processor}\n".encode() + graph.read_bytes())
    return cache_folder() / "streams" / digest.hexdigest()
