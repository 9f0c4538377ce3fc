"""Whether a server is ready and alive: the state behind GET /ready and /live.

A server is ready while it works: TorchServe has a worker, which makes steps (`metrics.STEPS`) while it has something to
do, and requests get captions. Where no client's did for a moment, or only from remembered features, a small test clip
goes through the whole server, to see that it would. A full queue is no fault. /live fails only if a restart would help.

The state is looked at in a thread of its own, so a probe waits for nothing.
"""

from __future__ import annotations

import http.client
import json
import logging
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from etenet import metrics
from etenet.assets import CANARY_CLIP
from etenet.serving import archive, draining
from etenet.serving.config import PROBE_HEADER
from etenet.serving.loopback import WITHOUT_PROXY, Address, SocketFile

_log = logging.getLogger(__name__)

LOOK_S = 1.0
FIRST_LOOKS_S = 0.2  # until the server is ready for the first time
IDLE_S = 3.0  # without a caption; then the test clip is sent
# Without a step; then the worker hangs. Together with a look and the deadline of its questions: within ten seconds.
HUNG_S = 7.5
CANARY_DEADLINE_S = 120.0  # it waits behind the clips of clients
MANAGEMENT_DEADLINE_S = 1.0
DEAD_AFTER_S = 300.0
LEAST_FREE_BYTES = 16 * 2**20  # for the files that a worker writes when it starts: metrics, and its log


class Health:
    """What is wrong with a server. `fault` is an empty string when it is ready."""

    def __init__(
        self,
        *,
        alive: Callable[[], bool],
        inference: Address,
        management: Address | SocketFile,
        figures: Path,
        probe_secret: str,
    ) -> None:
        self._alive = alive
        self._canary_request = urllib.request.Request(
            f"{inference.url}/predictions/{archive.MODEL_NAME}",
            data=CANARY_CLIP.read_bytes(),
            headers={"Content-Type": "video/mp4", PROBE_HEADER: probe_secret},
        )
        self._model = f"{management.url}/models/{archive.MODEL_NAME}"
        self._figures = figures
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="canary")
        self._canary: Future[str | None] | None = None
        self._steps = self._frames = self._finished = 0.0
        self._stepped_at = self._finished_at = time.monotonic()
        self._captioned_at = float("-inf")
        self._no_worker, self._no_caption, self._fault = "TorchServe starts", "nothing was captioned yet", "it starts"
        self._was_ready = False
        self.stopping = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the state up to date while the block runs."""
        end = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(end,), name="health", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            end.set()
            watcher.join()
            self._thread.shutdown(wait=False)  # a test clip that waits gets its answer when TorchServe ends

    @property
    def fault(self) -> str:
        """What is wrong, or an empty string when the server is ready."""
        if self.stopping:
            return "the server is shutting down"
        return self._fault if self._alive() else "TorchServe has ended"

    @property
    def live(self) -> bool:
        """Whether the server may still become ready without a restart. A start ends by itself."""
        return self._alive() and (not self._was_ready or time.monotonic() - self._finished_at < DEAD_AFTER_S)

    def refuse_newcomers(self) -> None:
        """Let the version that refuses get all further requests. Raises `OSError` if TorchServe does not answer."""
        request = urllib.request.Request(f"{self._model}/{draining.VERSION}/set-default", method="PUT")
        try:
            WITHOUT_PROXY.open(request, timeout=MANAGEMENT_DEADLINE_S).close()
        except urllib.error.HTTPError as error:
            _log.warning(
                "TorchServe answers %d, so requests that come during the shutdown are still captioned", error.code
            )

    def pending(self) -> int:
        """Requests to caption that TorchServe has accepted and not yet answered."""
        queued = sum(int(version["jobQueueStatus"]["pendingRequests"]) for version in self._versions())
        (in_progress,) = metrics.totals(self._figures, metrics.IN_PROGRESS)
        return queued + int(in_progress)

    def _watch(self, end: threading.Event) -> None:
        while not end.wait(LOOK_S if self._was_ready else FIRST_LOOKS_S):
            try:
                self._look()
            except Exception as error:  # the state must not stay what it was
                self._fault = f"the state cannot be read because of a bug: {error!r}"

    def _look(self) -> None:
        self._look_for_workers()
        now = time.monotonic()
        steps, frames, captions, errors, probes = metrics.totals(
            self._figures, metrics.STEPS, metrics.FRAMES, metrics.CAPTIONS, metrics.ERRORS, metrics.PROBES
        )
        if steps != self._steps:
            self._steps, self._stepped_at = steps, now
        if frames != self._frames:
            self._frames, self._captioned_at, self._no_caption = frames, now, ""
        if (finished := captions + errors + probes) != self._finished:
            self._finished = finished
            self._finished_at = self._stepped_at = now
        if self._canary and self._canary.done():
            outcome, self._canary = self._canary.result(), None
            if outcome == "":  # an archive of an older version counts neither steps nor probes
                self._captioned_at = self._stepped_at = self._finished_at = now
            if outcome is not None:
                self._no_caption = outcome
        idle = now - self._captioned_at > IDLE_S and not self.stopping
        if idle and not self._canary and not self._no_worker:
            self._canary = self._thread.submit(self._caption_canary)
        silent_s = now - self._stepped_at
        hangs = f"it hangs: no step of work for {silent_s:.0f} s" if silent_s > HUNG_S else ""
        self._fault = self._no_worker or hangs or self._no_caption
        self._was_ready = self._was_ready or not self._fault

    def _versions(self) -> list[Any]:
        """What TorchServe says of the versions that caption: one, but for a shutdown's that refuses."""
        with WITHOUT_PROXY.open(f"{self._model}/all", timeout=MANAGEMENT_DEADLINE_S) as response:
            return [version for version in json.load(response) if version["modelVersion"] != draining.VERSION]

    def _look_for_workers(self) -> None:
        """Java may be silent for seconds, while it collects garbage or the machine is busy. Then what was, holds."""
        try:
            states = [worker["status"] for version in self._versions() for worker in version["workers"]]
        except (OSError, http.client.HTTPException):
            return
        except (ValueError, KeyError, TypeError) as error:
            self._no_worker = f"TorchServe does not report its workers: {error!r}"
            return
        if "READY" in states:
            self._no_worker = ""
        elif shutil.disk_usage(self._figures).free < LEAST_FREE_BYTES:
            where = self._figures.parent
            self._no_worker = f"no worker is ready: no space left in {where}, where it needs some to start; free it"
        else:
            self._no_worker = "no worker is ready"

    def _caption_canary(self) -> str | None:
        """Why the test clip got no caption, an empty string if it got one, None if there was no room for it."""
        try:
            with WITHOUT_PROXY.open(self._canary_request, timeout=CANARY_DEADLINE_S) as response:
                caption = json.load(response)["caption"]
        except urllib.error.HTTPError as error:
            full = error.code == HTTPStatus.SERVICE_UNAVAILABLE
            return None if full else f"the test clip got status {error.code}; the log says why"
        except TimeoutError:
            return None
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            return f"the test clip got no caption: {error}"
        return "" if isinstance(caption, str) else "the test clip got no caption"
