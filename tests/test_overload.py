"""A real server under overload: an accepted request gets a caption in time, and a refusal comes at once.

Only the long form (`--hostile`) checks times; it needs a machine that runs nothing else.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.rig.load import closed_loop, open_loop, throughput_per_s
from etenet.model import checkpoint as checkpoints
from etenet.model.vocabulary import Vocabulary
from etenet.runtime import CPU_BATCH_CLIPS
from etenet.serving.config import ServerConfig
from etenet.video.limits import DecodeLimits
from tests.conftest import DEMO, EXAMPLES, REPOSITORY, Server, running_server
from tests.front import behind_nginx
from tests.test_probes import watched

CLIP = (REPOSITORY / "examples" / next(iter(EXAMPLES))).read_bytes()
CONFIG = ServerConfig.read(REPOSITORY / "config.properties")
# SECURITY.md, "The limits": Java in its heap and beside it, and the rest.
CEILING_BYTES = 2 * CONFIG.java_memory_bytes() + 4 * 2**30


@pytest.fixture(scope="module")
def busy(thorough: bool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The long form uses a slow network: beside the demo's, refusals would take a seventh of the cores."""
    checkpoint = DEMO
    if thorough:
        checkpoint = tmp_path_factory.mktemp("overload") / "untrained.pt"
        words = Vocabulary(f"word{number}" for number in range(1000))
        checkpoints.save(checkpoints.initialise("resnet18", words), checkpoint)
    with running_server("--checkpoint", str(checkpoint)) as running:
        yield running


@pytest.fixture(scope="module", params=["TorchServe itself", "through nginx"])
def door(busy: Server, request: pytest.FixtureRequest) -> Iterator[Server]:
    """The server, directly and through the nginx of deploy/."""
    with behind_nginx(busy) if request.param == "through nginx" else nullcontext(busy) as reached:
        yield reached


def peak_rate_per_s(server: Server, seconds: float) -> float:
    """Captions per second when the next batch is always waiting, and no more."""
    return throughput_per_s(
        asyncio.run(closed_loop(server.inference, [CLIP], clients=2 * CPU_BATCH_CLIPS, seconds=seconds))
    )


def test_ten_times_overload_gets_only_captions_and_refusals(door: Server, thorough: bool) -> None:
    rounds, seconds = (3, 20.0) if thorough else (1, 4.0)
    peaks, goodputs, answered = [peak_rate_per_s(door, seconds / 4)], [], []
    for _ in range(rounds):  # in turns, because the speed of a machine varies over minutes
        peaks.append(peak_rate_per_s(door, seconds))
        with watched(door, every_s=0.5) as watch:
            arrivals = asyncio.run(
                open_loop(door.inference, [CLIP], rate_per_s=10 * peaks[-1], seconds=seconds, steady=True)
            )
        assert set(watch.statuses) == {("ready", 200), ("live", 200)}
        first, last = arrivals[len(arrivals) // 4].intended_s, arrivals[-1].intended_s
        goodputs.append(throughput_per_s([arrival for arrival in arrivals if first <= arrival.responded_s < last]))
        answered += arrivals
    assert {arrival.status for arrival in answered} == {200, 503}
    if thorough:
        peak, goodput = np.mean(peaks[1:]), np.mean(goodputs)
        refused, accepted = (
            np.percentile([arrival.seconds for arrival in answered if arrival.status == status], 99)
            for status in (503, 200)
        )
        bound_s = 1.2 * (CONFIG.queue + 2 * CPU_BATCH_CLIPS) / peak + 1
        rates = f"peak {peak:.1f}/s, goodput {goodput:.1f}/s"
        print(
            f"{door.inference}: {rates}, p99 of 503 {1000 * refused:.0f} ms, of 200 {accepted:.1f} of {bound_s:.1f} s"
        )
        assert goodput >= 0.9 * peak
        assert refused <= 0.05
        assert accepted <= bound_s
    assert door.caption(CLIP).status == 200


def test_json_takes_no_more_memory_than_its_bytes(busy: Server) -> None:
    worker = busy.worker()
    assert worker is not None
    status = Path(f"/proc/{worker.pid}/status")

    def peak_mib() -> int:
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) // 1024

    before, body = peak_mib(), b"[" + b"[]," * (7 * 2**20) + b"[]]"
    with ThreadPoolExecutor(4) as clients:
        responses = list(clients.map(lambda _: busy.caption(body, Content_Type="application/json"), range(4)))
    assert [response.json()["error"]["code"] for response in responses] == ["not_a_video"] * 4
    assert peak_mib() - before < 8 * 4 * 21


def large(clip: bytes) -> bytes:
    """The clip, padded to the largest size of a body."""
    return (
        clip
        + struct.pack(">I4s", DecodeLimits().max_body_bytes - len(clip), b"free")
        + bytes(DecodeLimits().max_body_bytes - len(clip) - 8)
    )


@contextmanager
def weighed(server: Server) -> Iterator[list[int]]:
    """Yields the most memory, in bytes, that the server's processes had together while the block ran."""
    launcher, done, peaks = psutil.Process(server.process.pid), threading.Event(), [0]
    shared = psutil.virtual_memory().shared

    def watch() -> None:
        while not done.wait(0.05):
            # Bodies in decoders are in memory files, which the resident memory of no process includes.
            taken = psutil.virtual_memory().shared - shared
            for process in (launcher, *launcher.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    taken += process.memory_info().rss
            peaks[0] = max(peaks[0], taken)

    with ThreadPoolExecutor(1) as watcher:
        watching = watcher.submit(watch)
        try:
            yield peaks
        finally:
            done.set()
            watching.result()


def test_bodies_of_the_largest_size_stay_within_the_stated_memory(busy: Server, door: Server, thorough: bool) -> None:
    body, places = large(CLIP), CONFIG.queue + CPU_BATCH_CLIPS
    # Without nginx, TorchServe receives the bodies that it will refuse, too, and dies of too many.
    count = (places if door is busy else 2 * places) if thorough else 12
    with weighed(door) as peaks, ThreadPoolExecutor(count) as clients:
        responses = list(clients.map(door.caption, [body] * count))
    assert {response.status for response in responses} <= {200, 503}
    assert responses[0].json()["caption"]
    print(f"{door.inference}: {count} bodies of the largest size: {peaks[0] / 2**30:.1f} GiB")
    assert peaks[0] < CEILING_BYTES
    assert door.caption(CLIP).status == 200


FORM = "multipart/form-data; boundary=ab"


def form(*fields: tuple[str, bytes]) -> bytes:
    parts = (f"--ab\r\nContent-Disposition: form-data; {name}\r\n\r\n".encode() + value for name, value in fields)
    return b"\r\n".join((*parts, b"--ab--\r\n"))


def of_the_largest_size(kind: str) -> tuple[bytes, dict[str, str]]:
    """A body of a kind that takes more memory when it is read, and its headers."""
    size = DecodeLimits().max_body_bytes - 2**10
    match kind:
        case "JSON of many arrays":
            return b"[" + b"[]," * (size // 3) + b"[]]", {"Content_Type": "application/json"}
        case "JSON that is deep":
            return b"[" * (size // 2) + b"]" * (size // 2), {"Content_Type": "application/json"}
        case "text":
            return "\u00e9".encode() * (size // 2), {"Content_Type": "text/plain; charset=utf-8"}
        case "gzip":
            return gzip.compress(large(CLIP), 1), {"Content_Encoding": "gzip"}
        case "gzip that does not shrink":
            return gzip.compress(CLIP + os.urandom(size - 2**20), 0), {"Content_Encoding": "gzip"}
        case "gzip of too much":
            return gzip.compress(bytes(4 * size), 9), {"Content_Encoding": "gzip"}
        case "form with a file":
            return form(('name="data"; filename="a"', large(CLIP))), {"Content_Type": FORM}
        case "form with a field":
            return form(('name="data"', large(CLIP))), {"Content_Type": FORM}
        case "form with a hundred files":
            return form(*[('name="a"; filename="a"', bytes(size // 101))] * 100), {"Content_Type": FORM}
        case _:
            return large(CLIP), {"Content_Type": kind}


@pytest.mark.long
@pytest.mark.parametrize(
    "kind",
    [
        *("JSON of many arrays", "JSON that is deep", "text", "gzip", "gzip that does not shrink", "gzip of too much"),
        *("form with a file", "form with a field", "form with a hundred files"),
        *("video/mp4", "application/json", "text/html", "application/octet-stream"),
    ],
)
def test_eight_bodies_of_any_kind_stay_within_the_stated_memory(busy: Server, kind: str) -> None:
    body, headers = of_the_largest_size(kind)
    worker = busy.worker()
    with weighed(busy) as peaks, ThreadPoolExecutor(8) as clients:
        responses = list(clients.map(lambda _: busy.caption(body, **headers), range(8)))
    print(f"8 bodies, {kind}: {peaks[0] / 2**30:.1f} GiB, {[response.status for response in responses]}")
    assert all(response.status == 200 or 400 <= response.status < 500 for response in responses)
    assert peaks[0] < CEILING_BYTES
    assert busy.caption(CLIP).status == 200
    assert busy.worker() == worker
