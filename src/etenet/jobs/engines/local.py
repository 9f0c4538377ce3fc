"""Batch captioning in this process: decoding and encoding overlap, in full batches."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from etenet.captioning import captioner as captioners
from etenet.captioning.captioner import SANDBOX_EXISTS, Captioner
from etenet.captioning.captions import Caption
from etenet.captioning.options import CaptionOptions
from etenet.captioning.stream import Video
from etenet.errors import CaptionError, DeviceFailed, JobStopped
from etenet.jobs.journal import part_of_record, record_of
from etenet.jobs.progress import say
from etenet.jobs.run import MAX_BODY_BYTES, Engine, KeyedRecords, OnSegments, of_bodies, segments_expected
from etenet.runtime.kept import kept_encoder
from etenet.runtime.load import working_device
from etenet.video.limits import DecodeLimits
from etenet.video.segments import Cut

# For the user's own files: as large and as long as a film.
JOB_LIMITS = DecodeLimits(
    max_body_bytes=MAX_BODY_BYTES,
    max_pixels=8192 * 4608,  # 8K, more than action cameras and phones have
    max_memory_bytes=4 * 2**30,
    max_packets=2_000_000,
    decode_cpu_s=300.0,
    decode_deadline_s=900.0,
)
WORTH_CAPTURING_CLIPS = 16  # as CUDA graphs, on a GPU

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
        try:
            for key, outcome in captioner.caption_stream(videos, batch_clips=batch_clips, on_caption=on_caption):
                if isinstance(outcome, CaptionError):
                    yield key, dict(outcome.as_dict())
                else:
                    yield key, record_of(outcome.as_dict(), details=details)
        except DeviceFailed as error:
            raise JobStopped(f"{error}; start this job again, and it goes on from there") from error

    return of_bodies(captions, JOB_LIMITS.max_body_bytes, options.cut)


def load(
    checkpoint: Path,
    *,
    limits: DecodeLimits,
    clips: int,
    sandboxed: bool = SANDBOX_EXISTS,
    encoder_graph: Path | None = None,
) -> Captioner:
    """The captioner that finishes so many clips first: on a GPU if there is one, else with a compiled encoder.

    That is `encoder_graph`, which an archive has, or the one that is kept. With it, a CPU needs no torch.
    """
    if _has_gpu():
        capture = clips >= WORTH_CAPTURING_CLIPS
        return captioners.load(checkpoint, device="cuda", limits=limits, sandboxed=sandboxed, record_gpu=capture)
    announce = partial(say, f"compiling the encoder of {checkpoint}, once on this machine (up to a minute) ...")
    with nullcontext(encoder_graph) if encoder_graph else kept_encoder(checkpoint, announce) as graph:
        return captioners.load(checkpoint, limits=limits, sandboxed=sandboxed, compiled_encoder=graph or False)


def _has_gpu() -> bool:
    if sys.platform == "linux" and not any(map(os.path.exists, _SIGNS_OF_GPU)):
        return False
    import torch

    return torch.cuda.is_available() and working_device("cuda") == "cuda"
