"""Batch captioning by a server: a fixed number of requests in flight, each sent again until it has a response.

Connections are kept open. After a refusal (503) the client waits as long as the server says. After anything else that
is not from the captioner (a dropped connection, 502, 504, TorchServe's own 500) it waits longer each time. Waits are
random, so that clients do not all come back at once.
"""

from __future__ import annotations

import io
import json
import math
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from functools import partial
from urllib.parse import unquote, urlsplit

import urllib3

from etenet.assets import CANARY_CLIP
from etenet.captioning.options import CaptionOptions
from etenet.errors import ERROR_HEADER, JobStopped
from etenet.jobs.access import KEY_VARIABLE, authorization, predictions_of, proxy_to
from etenet.jobs.journal import Record, merged, record_of
from etenet.jobs.progress import say
from etenet.jobs.run import MAX_BODY_BYTES, Engine, KeyedRecords, OnSegments, of_bodies
from etenet.video.segments import WHOLE, Cut

IN_FLIGHT = 8
GIVE_UP_AFTER_S = 600.0  # on one clip without a response
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 10.0
PIECE_DEADLINE_S, RESPONSE_DEADLINE_S = 30.0, 300.0  # the first to send a piece of a clip, and to connect for it
CONNECT_DEADLINE_S, MEETING_DEADLINE_S, MEETING_TRIES = 5.0, 30.0, 5
REPORT_AFTER_S = 10.0
_NO_CAPTIONER = (403, 404, 405)
_TRY_AGAIN = (408, 429, 502, 503, 504)
_FIX_OF_LIMITS = "raise max_request_size and max_body_bytes there, or leave out --server"


def checkpoint_of(url: str) -> tuple[str, str]:
    """The id of the checkpoint that a server captions with, and in what precision.

    Raises `UsageError` if `url` is not that of a server, and `JobStopped` soon if none is there.
    """
    return _Client(predictions_of(url), CaptionOptions(), details=False, in_flight=1).meet()


def engine(
    url: str, options: CaptionOptions, *, details: bool, in_flight: int = IN_FLIGHT, checkpoint: str = ""
) -> Engine:
    """By a server that captions with this checkpoint. Raises `UsageError` if `url` is not that of a server."""
    client = _Client(predictions_of(url), options, details=details, in_flight=in_flight, checkpoint=checkpoint)

    def captions(bodies: Iterable[tuple[str, bytes, Cut]], on_segments: OnSegments) -> KeyedRecords:
        client.leaving.clear()
        rest, more = iter(bodies), True
        keys: dict[Future[Record], str] = {}
        try:
            while True:
                while more and len(keys) < in_flight:
                    if more := (request := next(rest, None)) is not None:
                        key, body, cut = request
                        keys[_started(partial(client.caption, body, cut, partial(on_segments, key)))] = key
                if not keys:
                    return
                done, _ = wait(keys, return_when=FIRST_COMPLETED)
                for future in done:
                    yield keys.pop(future), future.result()
        finally:
            client.leaving.set()

    return of_bodies(captions, MAX_BODY_BYTES, options.cut)


def _started(call: Callable[[], Record]) -> Future[Record]:
    """What a thread of its own will return. No end of a job waits for it, as for one of an executor."""
    future: Future[Record] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="client", daemon=True).start()
    return future


@dataclass(frozen=True, slots=True)
class _Response:
    """The record of one response. `rest` is the part of the video that the response left out."""

    record: Record
    rest: Cut | None = None
    duration_s: float = 0.0  # of the video


class _Client:
    """Captions one clip at a time in each of several threads."""

    def __init__(
        self, url: str, options: CaptionOptions, *, details: bool, in_flight: int, checkpoint: str = ""
    ) -> None:
        self._url, self._options, self._details, self._checkpoint = url, options, details, checkpoint
        self._connections = _connections(url, in_flight)
        self._headers = {"Content-Type": "application/octet-stream", **authorization()}
        self._timeout = urllib3.Timeout(connect=PIECE_DEADLINE_S, read=RESPONSE_DEADLINE_S)
        self._last_response_s = float("-inf")  # to any clip
        self._outage_is_known = False
        self._refused_bytes = math.inf  # of the smallest clip that was too large for the server
        self._precision = ""
        self.leaving = threading.Event()

    def meet(self) -> tuple[str, str]:
        """The id of the server's checkpoint and its precision, from its response to a clip that it does not count.

        Other than later, a server that is not there is not waited for; one that refuses is.
        """
        failures, began_s = 0, time.monotonic()
        timeout = urllib3.Timeout(connect=CONNECT_DEADLINE_S, read=MEETING_DEADLINE_S)
        while time.monotonic() - began_s < GIVE_UP_AFTER_S:
            try:
                response = self._connections.request(
                    "PUT",
                    self._url,
                    body=CANARY_CLIP.read_bytes(),
                    headers=self._headers,
                    timeout=timeout,
                    retries=False,
                )
            except urllib3.exceptions.HTTPError as error:
                failures += 1
                if failures == MEETING_TRIES or isinstance(error, urllib3.exceptions.TimeoutError):
                    raise JobStopped(
                        f"no server at {self._url} ({_reason(error)}); start it with: etenet serve, or correct --server"
                    ) from error
            else:
                if part := self._parsed(response, WHOLE):
                    if "error" in part.record:
                        raise JobStopped(f"{self._url} captions no clip now: {part.record['error']['message']}")
                    return self._checkpoint, self._precision
                self._report_outage(f"status {response.status}", began_s)
            self.leaving.wait(random.uniform(0, 2 * FIRST_WAIT_S))
        raise JobStopped(f"{self._url} had no room for {GIVE_UP_AFTER_S:.0f} s; start this job again later")

    def caption(self, body: bytes, cut: Cut, on_segments: Callable[[Sequence[Record], float], None]) -> Record:
        """The record of a clip, from as many responses as its segments take.

        Raises `JobStopped` if there is no captioner, or it no longer responds.
        """
        if len(body) >= self._refused_bytes:
            message = f"the server refused {self._refused_bytes} bytes, and this clip has {len(body)}; {_FIX_OF_LIMITS}"
            return {"error": {"code": "too_large", "message": message}}
        records: list[Record] = []
        rest: Cut | None = cut
        while rest:
            part = self._part(body, rest)
            records.append(part.record)
            if (segments := part.record.get("segments")) and not self.leaving.is_set():  # or the job has ended
                on_segments(segments, part.duration_s)
            rest = part.rest
        return merged(records)

    def _part(self, body: bytes, cut: Cut) -> _Response:
        headers = replace(self._options, cut=cut).as_headers() | self._headers | {"Content-Length": str(len(body))}
        began_s, wait_s = time.monotonic(), FIRST_WAIT_S
        while not self.leaving.is_set():
            try:
                # A file goes out in pieces. With bytes, the deadline would be that of the whole upload.
                response = self._connections.request(
                    "PUT", self._url, body=io.BytesIO(body), headers=headers, timeout=self._timeout, retries=False
                )
            except urllib3.exceptions.HTTPError as error:
                fault, least_s = _reason(error), 0.0
            else:
                if response.status == 413:
                    self._refused_bytes = min(self._refused_bytes, len(body))
                if part := self._parsed(response, cut):
                    self._last_response_s, self._outage_is_known = time.monotonic(), False
                    return part
                fault, least_s = f"status {response.status}", _seconds(response.headers.get("Retry-After", ""))
            if time.monotonic() - began_s > GIVE_UP_AFTER_S:
                return _Response(self._given_up(fault, began_s))
            self._report_outage(fault, max(began_s, self._last_response_s))
            self.leaving.wait(max(least_s, random.uniform(0, wait_s)))
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        raise JobStopped("the job ends")

    def _parsed(self, response: urllib3.BaseHTTPResponse, cut: Cut) -> _Response | None:
        """None if the response is not from the captioner, or the captioner has no room."""
        if response.status == 401:
            raise JobStopped(f"{self._url} wants a key that it knows; set {KEY_VARIABLE} to one")
        if response.status in _NO_CAPTIONER:
            raise JobStopped(
                f"{self._url} responds with status {response.status}: there is no captioner; correct --server"
            )
        if response.status in _TRY_AGAIN or (response.status == 500 and ERROR_HEADER not in response.headers):
            return None
        try:
            contents = json.loads(response.data)
            if response.status != 200:
                return _Response({"error": {name: str(contents["error"][name]) for name in ("code", "message")}})
            checkpoint = str(contents["model"]["checkpoint"])
            self._precision = str(contents["model"].get("precision", ""))
            record, duration_s = record_of(contents, details=self._details), contents["video"]["duration_s"]
            rest = cut.rest(record["segments"][-1]["end_s"], duration_s) if cut.into_segments else None
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if response.status == 413:  # TorchServe's own has no body
                message = f"the server refuses a body of this size; {_FIX_OF_LIMITS}"
                return _Response({"error": {"code": "too_large", "message": message}})
            raise JobStopped(
                f"{self._url} does not respond like a captioner (status {response.status}); correct --server"
            ) from error
        if checkpoint != (known := self._checkpoint or checkpoint):
            raise JobStopped(
                f"{self._url} has changed its checkpoint, from {known} to {checkpoint}; start this job again, "
                "with another --out or --overwrite"
            )
        self._checkpoint = known
        return _Response(record, rest, duration_s)

    def _report_outage(self, fault: str, since_s: float) -> None:
        """Once, if there has been no response for a while."""
        if time.monotonic() - since_s > REPORT_AFTER_S and not self._outage_is_known:
            self._outage_is_known = True
            say(f"no caption from {self._url} ({fault}); waiting for up to {GIVE_UP_AFTER_S / 60:.0f} min")

    def _given_up(self, fault: str, began_s: float) -> Record:
        if self._last_response_s > began_s:
            message = (
                f"no response to this clip for {GIVE_UP_AFTER_S:.0f} s, while other clips had one ({fault}); "
                "--retry-failed tries it again"
            )
            return {"error": {"code": "no_answer", "message": message}}
        raise JobStopped(
            f"no response from {self._url} for {GIVE_UP_AFTER_S:.0f} s ({fault}); start it, then this job again"
        )


def _connections(url: str, in_flight: int) -> urllib3.PoolManager:
    if (proxy := proxy_to(url)) is None:
        return urllib3.PoolManager(maxsize=in_flight, block=True)
    user = urlsplit(proxy).netloc.rpartition("@")[0]
    headers = urllib3.make_headers(proxy_basic_auth=unquote(user)) if user else None
    return urllib3.ProxyManager(proxy, proxy_headers=headers, maxsize=in_flight, block=True)


def _reason(error: urllib3.exceptions.HTTPError) -> str:
    """What urllib3 says, without the address of the connection object."""
    return re.sub(r"^<?[\w.]+\(.*?\)(?: at \w+>)?: ", "", str(error))


def _seconds(retry_after: str) -> float:
    """Retry-After in seconds (RFC 9110, 10.2.3). A date counts as 0."""
    return min(float(retry_after), LONGEST_WAIT_S) if retry_after.isdecimal() else 0.0
