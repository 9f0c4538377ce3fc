"""How much of everything is measured on a GPU, and how little in a dry run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Workload:
    encoder: str = "inceptionresnetv2"
    crop_px: int | None = None
    words: int = 12_000
    max_words: int = 20
    rounds: int = 10
    matrix: int = 8192
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # clips encoded at a time
    rendered: int = 200  # clips whose captions are compared
    streamed: int = 400
    clip_s: float = 10.0
    workers: tuple[int, ...] = (1, 2)
    worker_batches: tuple[int, ...] = (4, 8, 16)
    shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)  # of the capacity
    load_s: float = 4.0  # per point


MINIATURE = Workload(
    encoder="squeezenet1_1",
    crop_px=64,
    words=30,
    max_words=3,
    rounds=1,
    matrix=64,
    batches=(1, 2),
    rendered=2,
    streamed=2,
    clip_s=2.0,
    workers=(1,),
    worker_batches=(2,),
    shares=(0.5,),
    load_s=0.2,
)
