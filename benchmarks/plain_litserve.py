"""`python -m benchmarks.plain_litserve CHECKPOINT PORT`: LitServe with the plain code."""

from __future__ import annotations

import sys
from pathlib import Path

import litserve
from fastapi import Request

from benchmarks.plain import PlainCaptioner


class PlainAPI(litserve.LitAPI):
    def __init__(self, checkpoint: Path) -> None:
        super().__init__(api_path="/predictions/etenet")
        self.checkpoint = checkpoint

    def setup(self, device: str) -> None:  # noqa: ARG002
        self.captioner = PlainCaptioner(self.checkpoint)

    async def decode_request(self, request: Request) -> bytes:
        return await request.body()

    def predict(self, body: bytes) -> str:
        return self.captioner.caption(body)

    def encode_response(self, caption: str) -> dict[str, str]:
        return {"caption": caption}


if __name__ == "__main__":
    checkpoint, port = sys.argv[1:]
    litserve.LitServer(PlainAPI(Path(checkpoint)), accelerator="cpu").run(port=int(port), generate_client_file=False)
