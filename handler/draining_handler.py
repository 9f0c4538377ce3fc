"""The handler of the version that answers while the server shuts down (src/etenet/serving/draining.py)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from etenet.captioning.options import CaptionOptions
from etenet.errors import Overloaded
from etenet.serving.request import Request
from etenet.serving.request_log import RequestRecord, record_batch
from etenet.serving.response import error_body


class DrainingHandler:
    """Refuses every request."""

    def initialize(self, context: Any) -> None:
        """Nothing is loaded."""

    def handle(self, data: list[Mapping[str, Any]], context: Any) -> list[bytes]:
        started = time.perf_counter()
        error = Overloaded("the server is shutting down; send the video again in a moment")
        bodies = [error_body(context, number, error) for number in range(len(data))]
        requests = [
            Request(
                id=str(context.get_request_id(number)),
                body=row.get("body") or row.get("data") or b"",
                options=CaptionOptions(),
                accept="",
                explain=False,
                waited_s=None,
                error=error,
            )
            for number, row in enumerate(data)
        ]
        seconds = time.perf_counter() - started
        record_batch([RequestRecord(request=request, outcome=error, seconds=seconds) for request in requests])
        return bodies
