"""A real server under more work than it can do: who is let in gets a caption in time, who is not hears so at once.

Times are looked at in the long form only (`--hostile`), which wants a machine that does nothing else.
"""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import psutil
import pytest

from etenet.config import DecodeLimits
from etenet.server import ServerConfig
from tests.conftest import DEMO, EXAMPLES, REPOSITORY, Server, running_server
from tests.front import behind_nginx

CLIP = (REPOSITORY / "examples" / next(iter(EXAMPLES))).read_bytes()
CONFIG = ServerConfig.read(REPOSITORY / "config.properties")
BATCH = 8
# SECURITY.md, "The limits": Java in its heap and beside it, and the rest.
CEILING_BYTES = 2 * CONFIG.java_memory_bytes + 4 * 2**30


@pytest.fixture(scope="module")
def busy() -> Iterator[Server]:
    with running_server("--checkpoint", str(DEMO)) as running:
        yield running


@pytest.fixture(scope="module", params=["TorchServe itself", "through nginx"])
def door(busy: Server, request: pytest.FixtureRequest) -> Iterator[Server]:
    """The server by its own port and through the front of deploy/."""
    with behind_nginx(busy) if request.param == "through nginx" else nullcontext(busy) as reached:
        yield reached


@dataclass(frozen=True, slots=True)
class Arrival:
    """What became of one request, and when (`time.monotonic`). `status` 0 is no answer."""

    status: int
    began_s: float
    ended_s: float

    @property
    def seconds(self) -> float:
        return self.ended_s - self.began_s


async def _send(host: str, port: int, body: bytes) -> Arrival:
    started = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection(host, port)
        head = f"PUT /predictions/etenet HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        writer.write(head + body)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
        writer.close()
    except (OSError, asyncio.IncompleteReadError):
        head = b""
    return Arrival(int(head[9:12] or 0), started, time.monotonic())


async def _open_loop(server: Server, rate_per_s: float, seconds: float) -> list[Arrival]:
    """Requests at a steady rate, whether or not those before are answered."""
    host, port = server.inference.removeprefix("http://").split(":")
    sent, began = [], time.monotonic()
    for number in range(int(rate_per_s * seconds)):
        await asyncio.sleep(max(0.0, began + number / rate_per_s - time.monotonic()))
        sent.append(asyncio.create_task(_send(host, int(port), CLIP)))
    return await asyncio.gather(*sent)


def peak_rate_per_s(server: Server, seconds: float) -> float:
    """Captions per second when there is always one more clip to take, and no more."""
    done, captions = threading.Event(), Counter[int]()

    def client() -> None:
        while not done.is_set():
            captions[server.caption(CLIP).status] += 1

    with ThreadPoolExecutor(2 * BATCH) as clients:
        for _ in range(2 * BATCH):
            clients.submit(client)
        done.wait(seconds)
        counted = captions[200]
        done.set()
    return counted / seconds


def test_ten_times_overload_is_answered_with_captions_and_refusals_only(door: Server, thorough: bool) -> None:
    seconds = 60.0 if thorough else 8.0
    peak_rate_per_s(door, 5.0)
    peak = peak_rate_per_s(door, seconds / 2)
    arrivals = asyncio.run(_open_loop(door, 10 * peak, seconds))
    statuses = Counter(arrival.status for arrival in arrivals)
    assert set(statuses) == {200, 503}
    if thorough:
        first, last = arrivals[len(arrivals) // 4].began_s, arrivals[-1].began_s
        goodput = sum(a.status == 200 and first < a.ended_s < last for a in arrivals) / (last - first)
        refused, accepted = (
            np.percentile([arrival.seconds for arrival in arrivals if arrival.status == status], 99)
            for status in (503, 200)
        )
        bound_s = 1.2 * (CONFIG.queue + 2 * BATCH) / peak + 1
        rates = f"peak {peak:.1f}/s, goodput {goodput:.1f}/s"
        print(
            f"{door.inference}: {rates}, p99 of 503 {1000 * refused:.0f} ms, of 200 {accepted:.1f} of {bound_s:.1f} s"
        )
        assert goodput >= 0.9 * peak
        assert refused <= 0.05
        assert accepted <= bound_s
    assert door.caption(CLIP).status == 200


def large(clip: bytes) -> bytes:
    """The clip with as much after it as a body may have."""
    return (
        clip
        + struct.pack(">I4s", DecodeLimits().max_body_bytes - len(clip), b"free")
        + bytes(DecodeLimits().max_body_bytes - len(clip) - 8)
    )


def test_bodies_of_the_largest_size_take_no_more_memory_than_is_said(
    busy: Server, door: Server, thorough: bool
) -> None:
    launcher, body, done, peaks = psutil.Process(door.process.pid), large(CLIP), threading.Event(), [0]
    shared = psutil.virtual_memory().shared

    def watch() -> None:
        while not done.wait(0.05):
            # The bodies that decoders work on are in memory files, which no process shows as its own.
            taken = psutil.virtual_memory().shared - shared
            for process in (launcher, *launcher.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    taken += process.memory_info().rss
            peaks[0] = max(peaks[0], taken)

    watcher = threading.Thread(target=watch)
    watcher.start()
    places = CONFIG.queue + BATCH
    # TorchServe itself keeps what it has no place for until the whole body came, and dies of too much.
    count = (places if door is busy else 2 * places) if thorough else 12
    with ThreadPoolExecutor(count) as clients:
        answers = list(clients.map(door.caption, [body] * count))
    done.set()
    watcher.join()
    assert {answer.status for answer in answers} <= {200, 503}
    assert answers[0].json()["caption"]
    print(f"{door.inference}: {count} bodies of the largest size: {peaks[0] / 2**30:.1f} GiB")
    assert peaks[0] < CEILING_BYTES
    assert door.caption(CLIP).status == 200
