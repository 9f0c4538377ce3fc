"""Features -> words on a GPU: the whole search as one recording, beside a launch for each operation."""

from __future__ import annotations

import torch

from benchmarks.gpu.workload import Workload
from benchmarks.rig.timing import median_ms
from etenet.captioning.captioner import WORDS
from etenet.model.decoder import Decoder
from etenet.model.generate import search
from etenet.runtime.cuda import GpuSearch
from etenet.video.sampling import FRAMES_PER_CLIP

CLIPS = 16


def searching(decoder: Decoder, workload: Workload, device: torch.device) -> dict[str, float]:
    """Milliseconds for 16 clips, to sentences on the host."""
    decoder = decoder.to(device).eval()
    features = torch.rand(CLIPS, FRAMES_PER_CLIP, decoder.config.feature_size, device=device)
    ours = GpuSearch(decoder, max_words=workload.max_words, words=WORDS, frames_per_clip=FRAMES_PER_CLIP, device=device)
    return {
        "ours_ms": median_ms(lambda: ours(features), workload.rounds, device),
        "step_by_step_ms": median_ms(
            lambda: search(decoder, features, beam_size=5, max_words=workload.max_words, words=WORDS),
            workload.rounds,
            device,
        ),
    }
