"""The handler of the version that answers while the server shuts down (src/etenet/serving/draining.py)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from etenet import metrics
from etenet.errors import Overloaded
from etenet.serving.request import Request
from etenet.serving.request_log import RequestRecord, record_batch
from etenet.serving.response import error_body, set_headers


class DrainingHandler:
    """Refuses every request."""

    def initialize(self, _context: Any) -> None:
        """Nothing is loaded, but the figures get their room on the disk, which may be full later."""
        metrics.allocate()

    def handle(self, data: list[Mapping[str, Any]], context: Any) -> list[bytes]:
        started = time.perf_counter()
        error = Overloaded("the server is shutting down; send the video again in a moment")
        requests, bodies = [], []
        for number, row in enumerate(data):
            id, headers = str(context.get_request_id(number)), context.get_all_request_header(number)
            request = replace(Request.read(id, row, headers), error=error)
            set_headers(context, number, request)
            bodies.append(error_body(context, number, error))
            requests.append(request)
        seconds = time.perf_counter() - started
        record_batch([RequestRecord(request=request, outcome=error, seconds=seconds) for request in requests])
        return bodies
