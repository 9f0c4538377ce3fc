"""Whether a server is ready and alive: the state behind GET /ready and /live.

A server is ready while TorchServe has a worker and the server has just captioned something: the clip of a client, or
else a small test clip that goes through the whole server and is not counted. While the test clip waits in the queue,
the previous state holds. /live fails only if a restart would help.
"""

from __future__ import annotations

import json
import shutil
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
from etenet.serving.loopback import WITHOUT_PROXY, Address, SocketFile

STATE_HOLDS_S = 1.5
CANARY_PATIENCE_S = 0.5
CANARY_DEADLINE_S = 60.0
MANAGEMENT_DEADLINE_S = 1.0
DEAD_AFTER_S = 300.0
LEAST_FREE_BYTES = 16 * 2**20  # for the files that a worker writes when it starts: metrics, and its log


class Health:
    """What is wrong with a server; looks at most every `STATE_HOLDS_S`."""

    def __init__(
        self, *, alive: Callable[[], bool], inference: Address, management: Address | SocketFile, figures: Path
    ) -> None:
        self._alive = alive
        self._predictions = f"{inference.url}/predictions/{archive.MODEL_NAME}"
        self._model = f"{management.url}/models/{archive.MODEL_NAME}"
        self._figures = figures
        self._clip = CANARY_CLIP.read_bytes()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="canary")
        self._canary: Future[str] | None = None
        self._canary_sent_at = 0.0
        self._captions = 0.0
        self._checked_at = float("-inf")
        self._good_at = time.monotonic()
        self._fault = "not yet checked"
        self.stopping = False

    def fault(self) -> str:
        """What is wrong, or an empty string when the server is ready."""
        if self.stopping:
            return "the server is shutting down"
        if not self._alive():
            return "TorchServe has ended"
        with self._lock:
            if time.monotonic() - self._checked_at > STATE_HOLDS_S:
                self._fault = self._no_worker() or self._no_caption()
                self._checked_at = time.monotonic()
                if not self._fault:
                    self._good_at = self._checked_at
            return self._fault

    @property
    def live(self) -> bool:
        """Whether the server may still become ready without a restart."""
        self.fault()
        return self._alive() and time.monotonic() - self._good_at < DEAD_AFTER_S

    def pending(self) -> int:
        """Requests that TorchServe has accepted and not yet answered."""
        queued = self._description()["jobQueueStatus"]["pendingRequests"]
        return int(queued) + int(metrics.total(self._figures, metrics.IN_PROGRESS))

    def _description(self) -> Any:
        with WITHOUT_PROXY.open(self._model, timeout=MANAGEMENT_DEADLINE_S) as response:
            return json.load(response)[0]

    def _no_worker(self) -> str:
        try:
            states = [worker["status"] for worker in self._description()["workers"]]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            return f"TorchServe does not report its workers: {error}"
        if "READY" in states:
            return ""
        if shutil.disk_usage(self._figures).free < LEAST_FREE_BYTES:
            return f"no worker is ready: no space left in {self._figures.parent}, where it needs some to start; free it"
        return "no worker is ready"

    def _no_caption(self) -> str:
        captions, before = metrics.total(self._figures, metrics.CAPTIONS), self._captions
        self._captions = captions
        if captions > before:
            self._canary_sent_at = time.monotonic()  # it waits behind those clips
            if self._canary and self._canary.done():
                self._canary = None
            return ""
        if not self._canary:
            self._canary, self._canary_sent_at = self._thread.submit(self._caption_canary), time.monotonic()
        try:
            fault = self._canary.result(CANARY_PATIENCE_S)
        except NotYet:
            if (waited_s := time.monotonic() - self._canary_sent_at) < CANARY_DEADLINE_S:
                return self._fault
            return f"no caption of the test clip after {waited_s:.0f} s"
        self._canary = None
        return fault

    def _caption_canary(self) -> str:
        request = urllib.request.Request(self._predictions, data=self._clip, headers={"Content-Type": "video/mp4"})
        try:
            with WITHOUT_PROXY.open(request, timeout=2 * CANARY_DEADLINE_S) as response:
                caption = json.load(response)["caption"]
        except urllib.error.HTTPError as error:
            return f"the test clip got status {error.code}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"the test clip got no caption: {error}"
        return "" if isinstance(caption, str) else "the test clip got no caption"
