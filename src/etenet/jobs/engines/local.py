"""Batch captioning in this process: decoding and encoding overlap, in full batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from etenet.captioning import captioner as captioners
from etenet.captioning.captioner import SANDBOX_EXISTS, Captioner, decoders_for
from etenet.captioning.options import CaptionOptions
from etenet.captioning.stream import OnProgress, Video
from etenet.errors import CaptionError
from etenet.jobs.journal import record_of
from etenet.jobs.run import Engine, KeyedRecords, of_bodies, segments_expected
from etenet.model import checkpoint as checkpoints
from etenet.model.encoder import AbsentEncoder
from etenet.model.etenet import EtENet
from etenet.runtime.load import compile_network, working_device
from etenet.video.limits import DecodeLimits
from etenet.video.segments import Cut

# For the user's own files: as large and as long as a film.
JOB_LIMITS = DecodeLimits(
    max_body_bytes=2**30,
    max_memory_bytes=4 * 2**30,
    max_packets=2_000_000,
    decode_cpu_s=300.0,
    decode_deadline_s=900.0,
)
WORTH_COMPILING_CLIPS = 16


def engine(checkpoint: Path, options: CaptionOptions, *, details: bool, clips: int) -> Engine:
    """For about so many clips. Raises `CheckpointError`, and `BadOption` for what the checkpoint cannot do."""
    captioner = load(checkpoint, limits=JOB_LIMITS, clips=segments_expected(clips, options.cut))
    if refusal := captioner.refusal(options):
        raise refusal
    return engine_of(captioner, options, details=details)


def engine_of(captioner: Captioner, options: CaptionOptions, *, details: bool) -> Engine:
    """The engine of a captioner that can do what the options ask for."""

    def captions(bodies: Iterable[tuple[str, bytes, Cut]], on_progress: OnProgress[str]) -> KeyedRecords:
        videos = (Video(key, body, replace(options, cut=cut)) for key, body, cut in bodies)
        for key, outcome in captioner.caption_stream(videos, on_progress=on_progress):
            if isinstance(outcome, CaptionError):
                yield key, dict(outcome.as_dict())
            else:
                yield key, record_of(outcome.as_dict(), details=details)

    return of_bodies(captions, JOB_LIMITS.max_body_bytes, options.cut)


def load(checkpoint: Path, *, limits: DecodeLimits, clips: int, sandboxed: bool = SANDBOX_EXISTS) -> Captioner:
    """The captioner that finishes so many clips first: on a GPU if there is one, else compiled if that is worth it."""
    worth_compiling = clips >= WORTH_COMPILING_CLIPS
    if torch.cuda.is_available() and working_device("cuda") == "cuda":
        return captioners.load(
            checkpoint, device="cuda", limits=limits, sandboxed=sandboxed, record_gpu=worth_compiling
        )
    if not worth_compiling:
        return captioners.load(checkpoint, limits=limits, sandboxed=sandboxed)
    loaded = checkpoints.load(checkpoint)
    network, decoders = compile_network(loaded), decoders_for(loaded, limits=limits, sandboxed=sandboxed)
    # 200 MB less for Inception-ResNet-v2: the compiled encoder has weights of its own.
    without_encoder = EtENet(AbsentEncoder(loaded.model.encoder.name), loaded.model.decoder)
    return Captioner(replace(loaded, model=without_encoder), network, decoders)
