"""Whether a GPU gives the captions of float32 on a CPU, and a clip the same caption alone and in a batch."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import etenet
from benchmarks.gpu.workload import Workload
from benchmarks.rig.record import REPOSITORY
from etenet.captioning.captioner import decoders_for
from etenet.captioning.options import CaptionOptions
from etenet.captioning.stream import Video
from etenet.model import checkpoint as checkpoints
from etenet.runtime.cuda import GpuEncoder
from etenet.runtime.interface import encode_clips
from etenet.runtime.network import TorchNetwork
from etenet.video.clip import FRAMES_PER_CLIP
from training.demo import world

DEMO = REPOSITORY / "model_store" / "demo.pt"


def equality(workload: Workload, device: torch.device) -> dict[str, float]:
    """Shares of equal captions, over the examples and rendered clips of the demo world, with the demo checkpoint."""
    bodies = rendered(workload.rendered)
    expected = _captions(etenet.load(DEMO, compiled_encoder=False), bodies)
    captioner = etenet.load(DEMO, device=str(device), record_gpu=True)
    batched = _captions(captioner, bodies)
    alone = [text for body in bodies for text in _captions(captioner, [body])]
    return {
        "clips": len(bodies),
        "equal_share": _share(batched, expected),
        "alone_as_among_others_share": _share(alone, batched),
        "equal_share_in_bfloat16": _share(_captions(_in_bfloat16(device), bodies), expected),
    }


def rendered(count: int) -> list[bytes]:
    """The examples, and so many clips of the demo world."""
    examples = [path.read_bytes() for path in sorted((REPOSITORY / "examples").glob("*.mp4"))]
    with multiprocessing.get_context("forkserver").Pool() as processes:
        return [*examples, *processes.map(world.render, islice(world.clips(), count))]


class _Bfloat16Network(TorchNetwork):
    """The encoder of `runtime/cuda` in bfloat16, and the decoder on torch."""

    def __init__(self, checkpoint: checkpoints.Checkpoint, device: torch.device) -> None:
        super().__init__(checkpoint, device=device)
        self._encoder = GpuEncoder(
            checkpoint.encoder,
            checkpoint.preprocessing,
            frames_per_clip=FRAMES_PER_CLIP,
            device=device,
            compiled=False,
            dtype=torch.bfloat16,
        )

    def features(self, frames: NDArray[np.uint8]) -> Tensor:
        return encode_clips(frames, self._encoder, torch.cat)


def _in_bfloat16(device: torch.device) -> etenet.Captioner:
    checkpoint = checkpoints.load(DEMO)
    return etenet.Captioner(checkpoint, _Bfloat16Network(checkpoint, device), decoders_for(checkpoint))


def _captions(captioner: etenet.Captioner, bodies: Sequence[bytes]) -> list[str]:
    """The caption of each clip, or why there is none."""
    videos = [Video(number, body, CaptionOptions()) for number, body in enumerate(bodies)]
    outcomes = dict(captioner.caption_stream(videos))
    return [getattr(outcomes[number], "text", str(outcomes[number])) for number in range(len(bodies))]


def _share(some: Sequence[str], others: Sequence[str]) -> float:
    return statistics.mean(one == other for one, other in zip(some, others, strict=True))
