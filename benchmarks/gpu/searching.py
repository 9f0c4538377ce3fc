"""Features -> words on a GPU: the whole search as one CUDA graph, beside one launch per operation."""

from __future__ import annotations

import torch

from benchmarks.gpu.workload import Workload
from benchmarks.rig.timing import median_ms
from etenet.model.decoder import Decoder
from etenet.model.generate import generate
from etenet.runtime.cuda import BEAM_SIZE, GpuSearch
from etenet.video.clip import FRAMES_PER_CLIP

CLIPS = 16


def searching(decoder: Decoder, workload: Workload, device: torch.device) -> dict[str, float]:
    """Milliseconds from the features of 16 clips to sentences on the host."""
    decoder = decoder.to(device).eval()
    features = torch.rand(CLIPS, FRAMES_PER_CLIP, decoder.config.feature_size, device=device)
    ours = GpuSearch(decoder, max_words=workload.max_words, frames_per_clip=FRAMES_PER_CLIP, device=device)

    def step_by_step() -> object:
        return generate(decoder, features, beam_size=BEAM_SIZE, max_words=workload.max_words)

    return {
        "ours_ms": median_ms(lambda: ours(features), workload.rounds, device),
        "step_by_step_ms": median_ms(step_by_step, workload.rounds, device),
    }
