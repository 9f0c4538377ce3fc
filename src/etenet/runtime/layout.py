"""How an encoder lays out its frames on the cores: measured once for a network and a processor.

A core for each request wastes least, because no core waits for another. But a clip has 16 frames: where there are more
cores, several compute a request together, and how many is best depends on the processor. So does how many frames a
request has: with four, the weights are read a quarter as often. `etenet package` measures both, and the outcome is kept
where other things are that can be made again. Where nothing is kept, the default holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from etenet.files import cache_folder, replacing

CLIP_FRAMES = 16
MOST_FRAMES = 4  # of a request: a clip with fewer different frames pays for what it has not
WORTH_A_CHANGE = 0.95  # of the time with the default, or the difference may be noise
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Layout:
    """So many requests at the same time (OpenVINO's streams), each of so many frames."""

    streams: int
    frames: int

    @classmethod
    def default(cls, threads: int) -> Layout:
        """A core for each request, with as many frames as leave work for all cores in a clip."""
        streams = min(threads, CLIP_FRAMES)
        return cls(streams, min(MOST_FRAMES, CLIP_FRAMES // streams))

    @classmethod
    def read(cls, text: str, threads: int) -> Layout:
        """Raises `ValueError` if the text is not that of a layout for so many threads."""
        streams, frames = map(int, text.split(" "))
        layout = cls(streams, frames)
        if not (1 <= layout.streams <= threads and 1 <= layout.frames <= MOST_FRAMES):
            raise ValueError(f"{layout} is out of range")
        return layout


def layout(graph: Path, threads: int, processor: str) -> Layout:
    """That of the encoder in this file."""
    return _kept(graph, threads, processor) or Layout.default(threads)


def measure(graph: Path, threads: int, processor: str, prepare: Callable[[Layout], Callable[[], object]]) -> None:
    """Keep the fastest layout, if none is kept. `prepare` makes for a layout what encodes a clip."""
    if _kept(graph, threads, processor):
        return
    default = Layout.default(threads)
    best = _fastest([Layout(streams, default.frames) for streams in _halves(default.streams)], prepare)
    best = _fastest([Layout(best.streams, frames) for frames in _halves(default.frames)], prepare)
    with suppress(OSError), replacing(_file(graph, threads, processor)) as file:
        file.write(f"{best.streams} {best.frames}".encode())


def _kept(graph: Path, threads: int, processor: str) -> Layout | None:
    with suppress(OSError, ValueError):
        return Layout.read(_file(graph, threads, processor).read_text(), threads)
    return None


def _halves(number: int) -> list[int]:
    """8 -> [8, 4, 2, 1]"""
    return [number >> times for times in range(number.bit_length())]


def _fastest(layouts: Sequence[Layout], prepare: Callable[[Layout], Callable[[], object]]) -> Layout:
    """The first, unless another is clearly faster."""
    encoders = {layout: prepare(layout) for layout in layouts}
    seconds = dict.fromkeys(layouts, float("inf"))
    for _ in range(ROUNDS):
        for layout, encode in encoders.items():
            began_s = time.perf_counter()
            encode()
            seconds[layout] = min(seconds[layout], time.perf_counter() - began_s)
    best = min(layouts, key=seconds.__getitem__)
    return best if seconds[best] <= WORTH_A_CHANGE * seconds[layouts[0]] else layouts[0]


def _file(graph: Path, threads: int, processor: str) -> Path:
    """One for networks that differ only in their weights, which are not in the graph's own file."""
    digest = sha256(f"{threads} threads of {processor}\n".encode() + graph.read_bytes())
    return cache_folder() / "layouts" / digest.hexdigest()
