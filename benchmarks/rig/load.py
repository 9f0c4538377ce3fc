"""Load on a captioning server: a fixed number of clients, or arrivals that do not wait for responses.

Open-loop latency counts from the moment at which a request was intended to be sent. A server that stalls therefore
cannot hide the requests that would have come during the stall ("coordinated omission", G. Tene).
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np

PREDICTIONS = "/predictions/etenet"
PERCENTILES = (50, 90, 99, 99.9)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request and its response. Moments are of `time.monotonic`; `status` 0: there was no response."""

    status: int
    intended_s: float
    responded_s: float

    @property
    def seconds(self) -> float:
        return self.responded_s - self.intended_s


class Client:
    """Sends clips to one server, over connections that stay open and are used again.

    Python's garbage collector is off while it does: in a large process a collection takes a tenth of a second, which
    would count as the server's.
    """

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname, address.port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(self, body: bytes, intended_s: float | None = None) -> Arrival:
        intended_s = time.monotonic() if intended_s is None else intended_s
        try:
            reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
            writer.write(
                f"POST {PREDICTIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            )
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
            if head[9:12] == b"200":  # after any other status TorchServe closes the connection without notice
                self._idle.append((reader, writer))
            else:
                writer.close()
        except (OSError, asyncio.IncompleteReadError):
            head = b""
        return Arrival(int(head[9:12] or 0), intended_s, time.monotonic())

    async def __aenter__(self) -> Client:
        gc.collect()
        gc.disable()
        return self

    async def __aexit__(self, *_: object) -> None:
        gc.enable()
        for _reader, writer in self._idle:
            writer.close()


async def closed_loop(url: str, bodies: Sequence[bytes], *, clients: int, seconds: float) -> list[Arrival]:
    """`clients` that each send the next clip after the response to their last. Waits for the last responses."""
    turns = itertools.cycle(bodies)

    async def arrivals(client: Client, until_s: float) -> list[Arrival]:
        sent = []
        while time.monotonic() < until_s:
            sent.append(await client.send(next(turns)))
        return sent

    async with Client(url) as client:
        end_s = time.monotonic() + seconds
        return list(itertools.chain(*await asyncio.gather(*(arrivals(client, end_s) for _ in range(clients)))))


async def open_loop(
    url: str, bodies: Sequence[bytes], *, rate_per_s: float, seconds: float, steady: bool = False, seed: int = 0
) -> list[Arrival]:
    """Poisson arrivals (evenly spaced if `steady`); each is sent whether or not earlier ones have a response."""
    turns, sent = itertools.cycle(bodies), []
    async with Client(url) as client:
        began_s = time.monotonic()
        async for intended_s in _moments(began_s, rate_per_s, seconds, None if steady else random.Random(seed)):
            sent.append(asyncio.create_task(client.send(next(turns), intended_s)))
        return await asyncio.gather(*sent)


async def _moments(
    began_s: float, rate_per_s: float, seconds: float, chance: random.Random | None
) -> AsyncIterator[float]:
    moment_s = 0.0
    while (moment_s := moment_s + (chance.expovariate(rate_per_s) if chance else 1 / rate_per_s)) < seconds:
        await asyncio.sleep(max(0.0, began_s + moment_s - time.monotonic()))
        yield began_s + moment_s


def throughput_per_s(arrivals: Sequence[Arrival]) -> float:
    """Captions per second: the slope of their number over time, so that it does not matter where a batch is cut."""
    moments = sorted(arrival.responded_s for arrival in arrivals if arrival.status == 200)
    return float(np.polyfit(np.array(moments) - moments[0], np.arange(len(moments)), 1)[0])


def latency_percentiles_ms(arrivals: Sequence[Arrival]) -> dict[str, float]:
    """p50 to p99.9 of the latency of captions; refusals are not among them."""
    latencies_ms = [1000 * arrival.seconds for arrival in arrivals if arrival.status == 200]
    percentiles = np.percentile(latencies_ms, PERCENTILES)
    return {f"p{p:g}": round(float(ms), 2) for p, ms in zip(PERCENTILES, percentiles, strict=True)}
