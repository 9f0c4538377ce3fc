"""Whether a GPU says what float32 on a CPU says, and of a clip alone what it says of it among others."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Sequence
from itertools import islice

import torch

import etenet
from benchmarks.gpu.workload import Workload
from benchmarks.rig.record import REPOSITORY
from etenet.captioning.captioner import Captioner
from etenet.captioning.options import CaptionOptions
from etenet.captioning.stream import caption_stream
from etenet.model import checkpoint as checkpoints
from etenet.runtime.cuda import GpuEncoder
from etenet.video.segments import WHOLE
from training.demo import world

DEMO = REPOSITORY / "model_store" / "demo.pt"


def equality(workload: Workload, device: torch.device) -> dict[str, float]:
    """Shares of the examples and of rendered clips of the demo world, with the demo checkpoint."""
    bodies = rendered(workload.rendered)
    expected = _captions(etenet.load(DEMO), bodies)
    ours = etenet.load(DEMO, device=str(device), record_gpu=True)
    found = _captions(ours, bodies)
    alone = [text for body in bodies for text in _captions(ours, [body])]
    checkpoint = checkpoints.load(DEMO)
    in_bfloat16 = GpuEncoder(
        checkpoint.encoder, checkpoint.preprocessing, device=device, compiled=False, dtype=torch.bfloat16
    )
    coarser = _captions(Captioner(checkpoint, device=str(device), compiled_encoder=in_bfloat16), bodies)
    return {
        "clips": len(bodies),
        "equal_share": _share(found, expected),
        "alone_as_among_others_share": _share(alone, found),
        "equal_share_in_bfloat16": _share(coarser, expected),
    }


def rendered(count: int) -> list[bytes]:
    """The examples, and clips of the demo world."""
    examples = [path.read_bytes() for path in sorted((REPOSITORY / "examples").glob("*.mp4"))]
    with multiprocessing.get_context("forkserver").Pool() as processes:
        return [*examples, *processes.map(world.render, islice(world.clips(), count))]


def _captions(captioner: Captioner, bodies: Sequence[bytes]) -> list[str]:
    videos = ((number, body, WHOLE) for number, body in enumerate(bodies))
    told = dict(caption_stream(captioner, videos, CaptionOptions()))
    return [getattr(told[number], "text", str(told[number])) for number in range(len(bodies))]


def _share(some: Sequence[str], others: Sequence[str]) -> float:
    return statistics.mean(one == other for one, other in zip(some, others, strict=True))
