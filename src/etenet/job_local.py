"""Batch captioning in this process: some clips are decoded while others are encoded, in full batches."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from etenet import captioner as captioners
from etenet import checkpoint as checkpoints
from etenet.captioner import Captioner
from etenet.config import CaptionOptions, DecodeLimits
from etenet.errors import CaptionError
from etenet.job_records import record_of
from etenet.jobs import Answers, Engine, of_bodies

BATCH_CLIPS = 8
WORTH_COMPILING_CLIPS = 16


def engine(checkpoint: Path, options: CaptionOptions, *, details: bool, clips: int) -> Engine:
    """For about so many clips. Raises `CheckpointError`."""
    limits = DecodeLimits()
    captioner = load(checkpoint, limits=limits, clips=clips)

    def captions(bodies: Iterable[tuple[str, bytes]]) -> Answers:
        for key, outcome in captioner.caption_stream(bodies, options, batch_clips=BATCH_CLIPS):
            if isinstance(outcome, CaptionError):
                yield key, dict(outcome.as_dict())
            else:
                yield key, record_of(outcome.as_dict(), details=details)

    return of_bodies(captions, limits.max_body_bytes)


def load(checkpoint: Path, *, limits: DecodeLimits, clips: int) -> Captioner:
    """What captions so many clips soonest: on a GPU where there is one, else compiled where that is worth its time."""
    if torch.cuda.is_available():
        return captioners.load(checkpoint, device="cuda", limits=limits)
    if clips < WORTH_COMPILING_CLIPS:
        return captioners.load(checkpoint, limits=limits)
    from etenet.compiled_encoder import compile_encoder

    with tempfile.TemporaryDirectory() as scratch:
        graph = Path(scratch) / "encoder.xml"
        compile_encoder(checkpoints.load(checkpoint), graph)
        return captioners.load(checkpoint, limits=limits, compiled_encoder=graph)
