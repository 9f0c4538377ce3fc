"""Load on a captioning server: a fixed number of clients, or arrivals that do not wait for answers.

Open-loop latency counts from the moment a request was meant to be sent, so a server that stalls cannot hide the
requests that would have come meanwhile ("coordinated omission", G. Tene).
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


@dataclass(frozen=True, slots=True)
class Arrival:
    """What became of one request, and when (`time.monotonic`). `status` 0 is no answer."""

    status: int
    meant_s: float
    answered_s: float

    @property
    def seconds(self) -> float:
        return self.answered_s - self.meant_s


class Client:
    """Sends clips to one server, over connections that are kept open and used again.

    Python's collector rests meanwhile: it stops a large process for a tenth of a second, which would count as the
    server's.
    """

    def __init__(self, url: str) -> None:
        where = urlsplit(url)
        self._host, self._port = where.hostname, where.port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(self, body: bytes, meant_s: float | None = None) -> Arrival:
        meant_s = time.monotonic() if meant_s is None else meant_s
        try:
            reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
            writer.write(
                f"POST {PREDICTIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            )
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
            if head[9:12] == b"200":  # after anything else TorchServe hangs up without saying so
                self._idle.append((reader, writer))
            else:
                writer.close()
        except (OSError, asyncio.IncompleteReadError):
            head = b""
        return Arrival(int(head[9:12] or 0), meant_s, time.monotonic())

    async def __aenter__(self) -> Client:
        gc.collect()
        gc.disable()
        return self

    async def __aexit__(self, *_: object) -> None:
        gc.enable()
        for _, writer in self._idle:
            writer.close()


async def closed_loop(url: str, bodies: Sequence[bytes], *, clients: int, seconds: float) -> list[Arrival]:
    """`clients` that each send their next clip when the last is answered; the last ones are waited for."""
    turns = itertools.cycle(bodies)

    async def answers(client: Client, until_s: float) -> list[Arrival]:
        found = []
        while time.monotonic() < until_s:
            found.append(await client.send(next(turns)))
        return found

    async with Client(url) as client:
        end = time.monotonic() + seconds
        return list(itertools.chain(*await asyncio.gather(*(answers(client, end) for _ in range(clients)))))


async def open_loop(
    url: str, bodies: Sequence[bytes], *, rate_per_s: float, seconds: float, steady: bool = False, seed: int = 0
) -> list[Arrival]:
    """Poisson arrivals (evenly spaced where `steady`), whether or not those before are answered."""
    turns, sent = itertools.cycle(bodies), []
    async with Client(url) as client:
        began = time.monotonic()
        async for meant_s in _moments(began, rate_per_s, seconds, None if steady else random.Random(seed)):
            sent.append(asyncio.create_task(client.send(next(turns), meant_s)))
        return await asyncio.gather(*sent)


async def _moments(
    began: float, rate_per_s: float, seconds: float, chance: random.Random | None
) -> AsyncIterator[float]:
    moment = 0.0
    while (moment := moment + (chance.expovariate(rate_per_s) if chance else 1 / rate_per_s)) < seconds:
        await asyncio.sleep(max(0.0, began + moment - time.monotonic()))
        yield began + moment


def throughput_per_s(arrivals: Sequence[Arrival]) -> float:
    """Captions per second: the slope of their number over time, so that it does not matter where a batch is cut."""
    moments = sorted(arrival.answered_s for arrival in arrivals if arrival.status == 200)
    return float(np.polyfit(np.array(moments) - moments[0], np.arange(len(moments)), 1)[0])
