"""Batch captioning in this process: decoding and encoding overlap, in full batches."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from etenet.captioning import captioner as captioners
from etenet.captioning.captioner import SANDBOX_EXISTS, Captioner, decoders_for
from etenet.captioning.captions import Caption
from etenet.captioning.options import CaptionOptions
from etenet.captioning.stream import Video
from etenet.errors import CaptionError
from etenet.jobs.journal import part_of_record, record_of
from etenet.jobs.run import Engine, KeyedRecords, OnSegments, of_bodies, segments_expected
from etenet.model import checkpoint as checkpoints
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

_SIGNS_OF_GPU = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")  # NVIDIA's driver, AMD's, and WSL's


def engine(
    checkpoint: Path,
    options: CaptionOptions,
    *,
    details: bool,
    clips: int,
    soon: bool = False,
    encoder_graph: Path | None = None,
) -> Engine:
    """For about so many clips, each captioned as soon as it can be if `soon`, else in full batches.

    `encoder_graph` is that of `load`. Raises `CheckpointError`, and `BadOption` for what the checkpoint cannot do.
    """
    expected = segments_expected(clips, options.cut)
    captioner = load(checkpoint, limits=JOB_LIMITS, clips=expected, encoder_graph=encoder_graph)
    if refusal := captioner.refusal(options):
        raise refusal
    return engine_of(captioner, options, details=details, soon=soon)


def engine_of(captioner: Captioner, options: CaptionOptions, *, details: bool, soon: bool = False) -> Engine:
    """The engine of a captioner that can do what the options ask for."""
    batch_clips = captioner.network.few_clips if soon else None

    def captions(bodies: Iterable[tuple[str, bytes, Cut]], on_segments: OnSegments) -> KeyedRecords:
        def on_caption(key: str, caption: Caption) -> None:
            if options.cut.into_segments:
                on_segments(key, [part_of_record(caption.as_segment(), details=details)], caption.video.duration_s)

        videos = (Video(key, body, replace(options, cut=cut)) for key, body, cut in bodies)
        for key, outcome in captioner.caption_stream(videos, batch_clips=batch_clips, on_caption=on_caption):
            if isinstance(outcome, CaptionError):
                yield key, dict(outcome.as_dict())
            else:
                yield key, record_of(outcome.as_dict(), details=details)

    return of_bodies(captions, JOB_LIMITS.max_body_bytes, options.cut)


def load(
    checkpoint: Path,
    *,
    limits: DecodeLimits,
    clips: int,
    sandboxed: bool = SANDBOX_EXISTS,
    encoder_graph: Path | None = None,
) -> Captioner:
    """The captioner that finishes so many clips first: on a GPU if there is one, else compiled if that is worth it.

    With `encoder_graph`, which an archive has, it is compiled already, and torch is not imported without a GPU.
    """
    worth_compiling = clips >= WORTH_COMPILING_CLIPS
    if _has_gpu():
        return captioners.load(
            checkpoint, device="cuda", limits=limits, sandboxed=sandboxed, record_gpu=worth_compiling
        )
    if encoder_graph or not worth_compiling:
        return captioners.load(checkpoint, limits=limits, sandboxed=sandboxed, compiled_encoder=encoder_graph)
    loaded = checkpoints.load(checkpoint)
    network, decoders = compile_network(loaded), decoders_for(loaded, limits=limits, sandboxed=sandboxed)
    # 200 MB less for Inception-ResNet-v2: the compiled encoder has weights of its own.
    return Captioner(loaded.without_weights(), network, decoders)


def _has_gpu() -> bool:
    if sys.platform == "linux" and not any(map(os.path.exists, _SIGNS_OF_GPU)):
        return False
    import torch

    return torch.cuda.is_available() and working_device("cuda") == "cuda"
