"""Whether captions come out, and what is counted: GET /ready, /live and /metrics.

/ready is 200 when TorchServe has a worker and a caption came out a moment ago: that of a client, or else that of a
small clip sent through the whole server, which is not counted. While that clip stands in line behind others, the last
truth holds. /live fails only where a restart would help.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import Any

from etenet import metrics
from etenet.assets import CANARY_CLIP
from etenet.serving import archive
from etenet.serving.config import Address

EVIDENCE_HOLDS_S = 1.5
CANARY_PATIENCE_S = 0.5
CANARY_DEADLINE_S = 60.0
MANAGEMENT_DEADLINE_S = 1.0
HOPELESS_AFTER_S = 300.0

# For requests to this machine, whatever proxies the environment names.
WITHOUT_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Health:
    """What is wrong with a server, asked at most every second or so."""

    def __init__(self, *, alive: Callable[[], bool], inference: Address, management: Address, figures: Path) -> None:
        self._alive = alive
        self._predictions = f"{inference.url}/predictions/{archive.MODEL_NAME}"
        self._model = f"{management.url}/models/{archive.MODEL_NAME}"
        self._figures = figures
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="canary")
        self._canary: Future[str] | None = None
        self._canary_sent_at = 0.0
        self._captions = 0.0
        self._checked_at = float("-inf")
        self._good_at = time.monotonic()
        self._fault = "not yet checked"
        self.leaving = False

    def fault(self) -> str:
        """What is wrong, or an empty string when the server is ready."""
        if self.leaving:
            return "the server is shutting down"
        if not self._alive():
            return "TorchServe has ended"
        with self._lock:
            if time.monotonic() - self._checked_at > EVIDENCE_HOLDS_S:
                self._fault = self._no_worker() or self._no_caption()
                self._checked_at = time.monotonic()
                if not self._fault:
                    self._good_at = self._checked_at
            return self._fault

    @property
    def live(self) -> bool:
        """Whether there is still hope that it becomes ready by itself."""
        self.fault()
        return self._alive() and time.monotonic() - self._good_at < HOPELESS_AFTER_S

    def pending(self) -> int:
        """Requests that TorchServe took in and that have no answer yet."""
        queued = self._described()["jobQueueStatus"]["pendingRequests"]
        return int(queued) + int(metrics.total(self._figures, metrics.IN_PROGRESS))

    def _described(self) -> Any:
        with WITHOUT_PROXY.open(self._model, timeout=MANAGEMENT_DEADLINE_S) as response:
            return json.load(response)[0]

    def _no_worker(self) -> str:
        try:
            states = [worker["status"] for worker in self._described()["workers"]]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            return f"TorchServe does not describe its workers: {error}"
        return "" if "READY" in states else "no worker is ready"

    def _no_caption(self) -> str:
        captions, before = metrics.total(self._figures, metrics.CAPTIONS), self._captions
        self._captions = captions
        if captions > before:
            self._canary_sent_at = time.monotonic()  # it waits behind those that came out
            if self._canary and self._canary.done():
                self._canary = None
            return ""
        if not self._canary:
            self._canary, self._canary_sent_at = self._thread.submit(self._ask), time.monotonic()
        try:
            fault = self._canary.result(CANARY_PATIENCE_S)
        except NotYet:
            waits_s = time.monotonic() - self._canary_sent_at
            return self._fault if waits_s < CANARY_DEADLINE_S else f"no caption of the test clip after {waits_s:.0f} s"
        self._canary = None
        return fault

    def _ask(self) -> str:
        request = urllib.request.Request(
            self._predictions, data=CANARY_CLIP.read_bytes(), headers={"Content-Type": "video/mp4"}
        )
        try:
            with WITHOUT_PROXY.open(request, timeout=2 * CANARY_DEADLINE_S) as response:
                caption = json.load(response)["caption"]
        except urllib.error.HTTPError as error:
            return f"the test clip was answered with status {error.code}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"the test clip got no caption: {error}"
        return "" if isinstance(caption, str) else "the test clip got no caption"
