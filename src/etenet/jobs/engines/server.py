"""Batch captioning by a server: so many requests in flight and no more, each sent again until it has an answer.

Connections are kept open. A refusal (503) waits as long as it says, and whatever is no answer of the captioner's (a
dropped connection, 502, 504, TorchServe's own 500) waits longer each time; waits differ at random, so that clients do
not come back all at once.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from urllib.parse import urlsplit

import urllib3

from etenet.captioning.options import CaptionOptions
from etenet.errors import ERROR_HEADER, JobStopped, UsageError
from etenet.jobs.journal import Record, merged, record_of
from etenet.jobs.run import Answers, Engine, Reached, of_bodies
from etenet.video.limits import DecodeLimits
from etenet.video.segments import Cut

PATH = "/predictions/etenet"
IN_FLIGHT = 8
PATIENCE_S = 600.0  # with one clip, while it gets no answer
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 10.0
CONNECT_DEADLINE_S, ANSWER_DEADLINE_S = 5.0, 300.0
_NO_CAPTIONER = (401, 403, 404, 405)
_TRY_AGAIN = (408, 429, 502, 503, 504)


def engine(url: str, options: CaptionOptions, *, details: bool, in_flight: int = IN_FLIGHT) -> Engine:
    """Raises `UsageError` for what is no URL of a server."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UsageError(f"--server must look like http://localhost:8080, got {url!r}")
    client = _Client(url.rstrip("/") + PATH, options, details=details, in_flight=in_flight)

    def captions(bodies: Iterable[tuple[str, bytes, Cut]], reached: Reached) -> Answers:
        rest, more = iter(bodies), True
        asked: dict[Future[Record], str] = {}
        with ThreadPoolExecutor(in_flight, thread_name_prefix="client") as threads:
            try:
                while True:
                    while more and len(asked) < in_flight:
                        if more := (given := next(rest, None)) is not None:
                            key, body, cut = given
                            asked[threads.submit(client.caption, body, cut, partial(reached, key))] = key
                    if not asked:
                        return
                    done, _ = wait(asked, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield asked.pop(future), future.result()
            finally:
                client.leaving.set()

    return of_bodies(captions, DecodeLimits().max_body_bytes, options.cut)


@dataclass(frozen=True, slots=True)
class _Answer:
    """About a video of this length, or a part of it; `rest` is what it left out."""

    record: Record
    rest: Cut | None = None
    duration_s: float = 0.0


class _Client:
    """Asks for one caption at a time in each of several threads."""

    def __init__(self, url: str, options: CaptionOptions, *, details: bool, in_flight: int) -> None:
        self._url, self._options, self._details = url, options, details
        self._connections = urllib3.PoolManager(maxsize=in_flight, block=True)
        self._timeout = urllib3.Timeout(connect=CONNECT_DEADLINE_S, read=ANSWER_DEADLINE_S)
        self._answered_s = float("-inf")  # when any clip was
        self.leaving = threading.Event()

    def caption(self, body: bytes, cut: Cut, reached: Callable[[float, float], None]) -> Record:
        """The record of a clip, from as many answers as its segments take.

        Raises `JobStopped` where there is no captioner, or none answers any more.
        """
        records: list[Record] = []
        rest: Cut | None = cut
        while rest:
            answer = self._answer(body, rest)
            records.append(answer.record)
            if rest := answer.rest:
                reached(rest.start_s, answer.duration_s)
        return merged(records)

    def _answer(self, body: bytes, cut: Cut) -> _Answer:
        headers = replace(self._options, cut=cut).as_headers() | {"Content-Type": "application/octet-stream"}
        began_s, wait_s = time.monotonic(), FIRST_WAIT_S
        while not self.leaving.is_set():
            try:
                response = self._connections.request(
                    "PUT", self._url, body=body, headers=headers, timeout=self._timeout, retries=False
                )
            except urllib3.exceptions.HTTPError as error:
                fault, least_s = f"{error}", 0.0
            else:
                if answer := self._parsed(response, cut):
                    self._answered_s = time.monotonic()
                    return answer
                fault, least_s = f"status {response.status}", _seconds(response.headers.get("Retry-After", ""))
            if time.monotonic() - began_s > PATIENCE_S:
                return _Answer(self._given_up(fault, began_s))
            self.leaving.wait(max(least_s, random.uniform(0, wait_s)))
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        raise JobStopped("the job ends")

    def _parsed(self, response: urllib3.BaseHTTPResponse, cut: Cut) -> _Answer | None:
        """What the captioner says of the clip; None where it was not the captioner who spoke, or it had no place."""
        if response.status in _NO_CAPTIONER:
            raise JobStopped(f"{self._url} answers with status {response.status}: there is no captioner")
        if response.status in _TRY_AGAIN or (response.status == 500 and ERROR_HEADER not in response.headers):
            return None
        try:
            answer = json.loads(response.data)
            if response.status != 200:
                return _Answer({"error": {name: str(answer["error"][name]) for name in ("code", "message")}})
            record, duration_s = record_of(answer, details=self._details), answer["video"]["duration_s"]
            rest = cut.rest(record["segments"][-1]["end_s"], duration_s) if cut.into_segments else None
            return _Answer(record, rest, duration_s)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if response.status == 413:  # TorchServe's own has no body
                return _Answer({"error": {"code": "too_large", "message": "the server takes no body as large as this"}})
            raise JobStopped(f"{self._url} does not answer like a captioner (status {response.status})") from error

    def _given_up(self, fault: str, began_s: float) -> Record:
        if self._answered_s > began_s:
            message = f"the server answers others, but not about this clip for {PATIENCE_S:.0f} s ({fault})"
            return {"error": {"code": "no_answer", "message": message}}
        raise JobStopped(
            f"{self._url} has not answered for {PATIENCE_S:.0f} s ({fault}); start it, and this job once more"
        )


def _seconds(retry_after: str) -> float:
    """RFC 9110, 10.2.3, in seconds; a date is not waited for."""
    return min(float(retry_after), LONGEST_WAIT_S) if retry_after.isdecimal() else 0.0
