"""`python -m benchmarks.peers.litserve_api CHECKPOINT PORT`: LitServe that runs the plain code."""

# Without `from __future__ import annotations`: LitServe reads the annotations at run time.

import sys
from pathlib import Path
from typing import Annotated

import litserve
from fastapi import Body

from benchmarks.peers.plain import PlainCaptioner


class PlainAPI(litserve.LitAPI):  # type: ignore[misc]  # litserve has no types
    def __init__(self, checkpoint: Path) -> None:
        super().__init__(api_path="/predictions/etenet")
        self.checkpoint = checkpoint

    def setup(self, device: str) -> None:  # noqa: ARG002
        self.captioner = PlainCaptioner(self.checkpoint)

    def decode_request(self, request: Annotated[bytes, Body()]) -> bytes:
        return request

    def predict(self, body: bytes) -> str:
        return self.captioner.caption(body)

    def encode_response(self, caption: str) -> dict[str, str]:
        return {"caption": caption}


if __name__ == "__main__":
    checkpoint, port = sys.argv[1:]
    litserve.LitServer(PlainAPI(Path(checkpoint)), accelerator="cpu", timeout=600).run(
        port=int(port), generate_client_file=False
    )
