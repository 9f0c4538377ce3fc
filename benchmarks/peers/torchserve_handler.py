"""A TorchServe handler that runs the plain code; `rig/servers.py` packages it with the same checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.peers.plain import PlainCaptioner


class PlainHandler:
    def initialize(self, context: Any) -> None:
        folder = Path(context.system_properties["model_dir"])
        self.captioner = PlainCaptioner(folder / context.manifest["model"]["serializedFile"])

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[dict[str, str]]:  # noqa: ARG002
        return [{"caption": self.captioner.caption(bytes(row.get("body") or row["data"]))} for row in data]
