"""Batch captioning in this process: some clips are decoded while others are encoded, in full batches."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from etenet.captioning import captioner as captioners
from etenet.captioning.captioner import Captioner
from etenet.captioning.options import CaptionOptions
from etenet.captioning.stream import caption_stream
from etenet.errors import CaptionError
from etenet.jobs.journal import record_of
from etenet.jobs.run import Answers, Engine, Reached, of_bodies, segments_expected
from etenet.model import checkpoint as checkpoints
from etenet.video.limits import DecodeLimits
from etenet.video.segments import Cut

BATCH_CLIPS, GPU_BATCH_CLIPS = 8, 16
# Of one's own files: as large and as long as a film.
JOB_LIMITS = DecodeLimits(
    max_body_bytes=2**30, max_memory_bytes=4 * 2**30, max_packets=2_000_000, decode_deadline_s=300.0
)
WORTH_COMPILING_CLIPS = 16


def engine(checkpoint: Path, options: CaptionOptions, *, details: bool, clips: int) -> Engine:
    """For about so many clips. Raises `CheckpointError`."""
    captioner = load(checkpoint, limits=JOB_LIMITS, clips=segments_expected(clips, options.cut))

    def captions(bodies: Iterable[tuple[str, bytes, Cut]], reached: Reached) -> Answers:
        batch_clips = GPU_BATCH_CLIPS if captioner.device.type == "cuda" else BATCH_CLIPS
        for key, outcome in caption_stream(captioner, bodies, options, batch_clips=batch_clips, reached=reached):
            if isinstance(outcome, CaptionError):
                yield key, dict(outcome.as_dict())
            else:
                yield key, record_of(outcome.as_dict(), details=details)

    return of_bodies(captions, JOB_LIMITS.max_body_bytes, options.cut)


def load(checkpoint: Path, *, limits: DecodeLimits, clips: int) -> Captioner:
    """What captions so many clips soonest: on a GPU where there is one, else compiled where that is worth its time."""
    if torch.cuda.is_available():
        worth_recording = clips >= WORTH_COMPILING_CLIPS
        return captioners.load(checkpoint, device="cuda", limits=limits, record_gpu=worth_recording)
    if clips < WORTH_COMPILING_CLIPS:
        return captioners.load(checkpoint, limits=limits)
    from etenet.runtime.openvino import compile_encoder

    with tempfile.TemporaryDirectory() as scratch:
        graph = Path(scratch) / "encoder.xml"
        compile_encoder(checkpoints.load(checkpoint), graph)
        return captioners.load(checkpoint, limits=limits, compiled_encoder=graph)
