"""Batch captioning in this process: some clips are decoded while others are encoded, in full batches."""

from __future__ import annotations

from collections.abc import Iterable

from etenet.captioner import Captioner
from etenet.config import CaptionOptions
from etenet.errors import CaptionError
from etenet.job_records import record_of
from etenet.jobs import Answers, Engine


def engine(captioner: Captioner, options: CaptionOptions, *, details: bool, batch_clips: int) -> Engine:
    def captions(bodies: Iterable[tuple[str, bytes]]) -> Answers:
        for key, outcome in captioner.caption_stream(bodies, options, batch_clips=batch_clips):
            if isinstance(outcome, CaptionError):
                yield key, dict(outcome.as_dict())
            else:
                yield key, record_of(outcome.as_dict(), details=details)

    return captions
