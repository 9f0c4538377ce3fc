"""A server that works for an hour, with hostile clips among the good ones: nothing ends, grows or becomes slower.

`--soak-s` sets the length. The comparison of latencies needs a machine that runs nothing else.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import psutil
import pytest

from tests.conftest import DEMO, Server, ask, decoders_of, running_server
from tests.hostile import hostile_files
from tests.hostile.alarm import Alarm
from tests.test_reliability import GOOD, worker_of

CLIENTS = 8
HOSTILE_SHARE = 0.05
SAMPLE_EVERY_S = 2.0
MOST_GROWTH_BYTES, MOST_GROWTH_DESCRIPTORS, MOST_GROWTH_LATENCY = 32 * 2**20, 2, 1.1


@dataclass
class Soak:
    """What clients and the machine saw. Moments are in seconds since the beginning."""

    server: Server
    hostile: list[bytes]
    began_s: float = field(default_factory=time.monotonic)
    good: list[tuple[float, float]] = field(default_factory=list)  # moment, latency in s
    hostile_statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    def send(self, number: int, until_s: float) -> None:
        chance, clips = random.Random(number), list(GOOD.items())
        while (began_s := self.now_s) < until_s:
            if chance.random() < HOSTILE_SHARE:
                self.hostile_statuses[self.server.caption(chance.choice(self.hostile)).status] += 1
                continue
            caption, body = chance.choice(clips)
            response = self.server.caption(body)
            self.good.append((began_s, self.now_s - began_s))
            if response.status != 200 or response.json()["caption"] != caption:
                self.wrong.append(f"{caption}: {response.status} {response.body[:200]!r}")

    def watch(self, done: threading.Event) -> None:
        launcher, worker = psutil.Process(self.server.process.pid), worker_of(self.server)
        (java,) = [child for child in launcher.children() if "java" in child.name()]
        while not done.wait(SAMPLE_EVERY_S):
            used = {}
            for name, process in (("launcher", launcher), ("Java", java), ("worker", worker)):
                used[f"memory of the {name}"] = float(process.memory_info().rss)
                used[f"descriptors of the {name}"] = float(process.num_fds())
            decoders = [psutil.Process(pid) for pid in decoders_of(worker.pid)]
            used["memory of a decoder"] = float(np.mean([decoder.memory_info().rss for decoder in decoders]))
            self.samples.append((self.now_s, used))

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.began_s


@pytest.mark.long
def test_an_hour_with_hostile_clips_leaves_the_server_as_it_was(alarm: Alarm, request: pytest.FixtureRequest) -> None:
    seconds = request.config.getoption("--soak-s")
    with running_server("--checkpoint", str(DEMO)) as server:
        soak, done = Soak(server, [file.body for file in hostile_files(alarm.trap)]), threading.Event()
        worker = worker_of(server)
        with ThreadPoolExecutor(CLIENTS + 1) as threads:
            watcher = threads.submit(soak.watch, done)
            sent = [threads.submit(soak.send, number, seconds) for number in range(CLIENTS)]
            for future in sent:
                future.result()
            done.set()
            watcher.result()
        assert ask(f"{server.exporter}/ready").status == 200
        assert worker_of(server).pid == worker.pid
    third_s, tenth_s = seconds / 3, seconds / 10

    def typical(name: str, part: int, part_s: float = third_s) -> float:
        return float(np.median([used[name] for at_s, used in soak.samples if part == int(at_s // part_s)]))

    def p99_s(third: int) -> float:
        return float(np.percentile([latency_s for at_s, latency_s in soak.good if third == int(at_s // third_s)], 99))

    growth = {name: typical(name, 2) - typical(name, 0) for name in soak.samples[0][1]}
    first_s, last_s = p99_s(0), p99_s(2)
    print(f"{seconds:g} s, {CLIENTS} clients: {len(soak.good)} good clips, hostile {dict(soak.hostile_statuses)}")
    for name in growth:
        print(f"{name}, in tenths of the time:", [round(typical(name, tenth, tenth_s)) for tenth in range(10)])
    print(f"p99 of the first third {1000 * first_s:.0f} ms, of the last {1000 * last_s:.0f} ms; grown by {growth}")
    assert soak.wrong == []
    assert all(status == 200 or 400 <= status < 500 for status in soak.hostile_statuses)
    assert not alarm.triggered()
    for name, grown in growth.items():
        assert grown <= (MOST_GROWTH_BYTES if name.startswith("memory") else MOST_GROWTH_DESCRIPTORS), name
    assert last_s <= MOST_GROWTH_LATENCY * first_s
