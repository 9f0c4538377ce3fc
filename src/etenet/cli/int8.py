"""`etenet package --int8`: the encoder's graph in int8, and whether its captions are still those of float32.

Some of the user's clips set the ranges of the quantised layers. The others are captioned by both forms, and where the
captions agree too rarely, int8 is refused.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from etenet.captioning.captioner import Captioner, decoders_for
from etenet.captioning.options import CaptionOptions
from etenet.errors import CaptionError, UsageError, counted, named
from etenet.files import as_it_looks
from etenet.jobs import run
from etenet.jobs.engines import local
from etenet.jobs.inputs import JobClip
from etenet.jobs.progress import Progress, Summary
from etenet.linux import cores
from etenet.model.checkpoint import Checkpoint
from etenet.runtime import int8
from etenet.runtime.openvino import CompiledEncoder, OpenVinoNetwork
from etenet.sandbox.pool import Decoders
from etenet.scoring import agreement
from etenet.scoring.scores import Captions, Scorer

LEAST_CLIPS = 10
CALIBRATING_SHARE = 4  # every fourth clip, but no more than
MOST_CALIBRATING = 32
FRAMES_OF_A_CLIP = 8  # are used to calibrate


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantiser:
    """Replaces a graph by its int8 form. `references` are for the held-out clips, by their `video`."""

    calibrating: Sequence[JobClip]
    held_out: Sequence[JobClip]
    references: Captions | None
    least_agreement: float | None

    @classmethod
    def of(cls, clips: Sequence[JobClip], references: Captions | None, least_agreement: float | None) -> Quantiser:
        """Raises `UsageError` if something is missing, before any work is done."""
        int8.require_nncf()
        if len(clips) < LEAST_CLIPS:
            raise UsageError(f"{counted(len(clips), 'clip')} to calibrate with; give {LEAST_CLIPS} or more, better 200")
        step = max(CALIBRATING_SHARE, len(clips) // MOST_CALIBRATING)
        calibrating = clips[::step][:MOST_CALIBRATING]
        held_out = [clip for clip in clips if clip not in calibrating]
        if references is not None:
            references = _of_clips(held_out, references)
            Scorer(references, meteor=False)
        return cls(calibrating=calibrating, held_out=held_out, references=references, least_agreement=least_agreement)

    def __call__(self, checkpoint: Checkpoint, graph: Path) -> None:
        """`graph` is that of the checkpoint in float32. Raises `UsageError` if int8 changes too many captions."""
        decoders = decoders_for(checkpoint, limits=local.JOB_LIMITS)
        quantised, frames = graph.with_name("int8.xml"), self._frames(decoders)
        exact = self._captions(checkpoint, graph, decoders)
        if not exact:
            raise UsageError("none of the held-out clips can be captioned; give other clips to --calibrate")
        references = self.references and {clip: self.references[clip] for clip in exact}
        for careful in (False, True):
            int8.quantise(graph, quantised, frames, careful=careful)
            cheaper = self._captions(checkpoint, quantised, decoders)
            compared = agreement.compare(exact, {clip: cheaper.get(clip, "") for clip in exact}, references)
            if compared.reaches(self.least_agreement):
                break
            if careful:
                raise UsageError(f"int8 changes too much: {compared}; {self._wanted()}")
            print(f"etenet package: int8: {compared}; trying again with more care, which takes longer", file=sys.stderr)
        print(f"etenet package: int8: {compared}", file=sys.stderr)
        for suffix in (".xml", ".bin"):
            os.replace(quantised.with_suffix(suffix), graph.with_suffix(suffix))

    def _frames(self, decoders: Decoders) -> NDArray[np.uint8]:
        """(N, resize_px, resize_px, 3)."""
        frames = []
        for clip in self.calibrating:
            body = run.read(clip.source, decoders.limits.max_body_bytes)
            if isinstance(body, bytes):
                with suppress(CaptionError):
                    (decoded,) = decoders.submit(body, run.part_of(clip, CaptionOptions().cut)).result()
                    frames.append(decoded.frames[:: len(decoded.frames) // FRAMES_OF_A_CLIP])
        if not frames:
            raise UsageError(
                f"none of the clips to calibrate with can be decoded, among them {named([self.calibrating[0].path])}; "
                "give other clips to --calibrate"
            )
        return np.concatenate(frames)

    def _captions(self, checkpoint: Checkpoint, graph: Path, decoders: Decoders) -> dict[str, str]:
        """Those of the held-out clips, as far as they have any."""
        network = OpenVinoNetwork(checkpoint, CompiledEncoder(graph, threads=cores()))
        captioner = Captioner(checkpoint.without_weights(), network, decoders)
        engine = local.engine_of(captioner, CaptionOptions(), details=False)
        with Progress(Summary(len(self.held_out)), title=f"etenet package: {network.precision}") as progress:
            records = progress.count(engine(self.held_out, lambda *_: None))
            return {record["video"]: record["caption"] for record in records if "caption" in record}

    def _wanted(self) -> str:
        least = self.least_agreement
        if self.references is None:
            needed = 100 * (agreement.LEAST_AGREEMENT if least is None else least)
            return f"{needed:g} % are needed; package without --int8, or ask for less with --agreement"
        share = f", and {100 * least:g} % that are the same or as good" if least else ""
        return f"at most {agreement.MOST_LOST_POINTS} points of CIDEr less are allowed{share}; package without --int8"


def _of_clips(clips: Sequence[JobClip], references: Captions) -> dict[str, Sequence[str]]:
    """The references of each clip: those by its `video`, or else by the name of its file without the suffix."""
    names = {clip.video: as_it_looks(clip.video) for clip in clips}
    names |= {
        clip.video: as_it_looks(PurePath(clip.path).stem) for clip in clips if names[clip.video] not in references
    }
    if missing := [clip for clip, name in names.items() if name not in references]:
        raise UsageError(f"no reference for {named(missing)}; add references, or leave these clips out")
    return {clip: references[name] for clip, name in names.items()}
