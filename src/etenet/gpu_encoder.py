"""phi on a GPU: resized frames -> features, by the fused network (`fused_encoder.py`) in bfloat16, channels last.

Frames go up as bytes from pinned memory. The network is compiled, and recorded for a few batch sizes; a batch of
another size is filled up to the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etenet.config import FRAMES_PER_CLIP, Preprocessing
from etenet.cuda_graph import Play, recorded
from etenet.encoder import Encoder
from etenet.fused_encoder import FusedEncoder

BATCH_CLIPS = (1, 2, 4, 8, 16)
_log = logging.getLogger(__name__)


class GpuEncoder:
    """One instance serves one thread at a time."""

    def __init__(
        self,
        encoder: Encoder,
        how: Preprocessing,
        *,
        device: torch.device,
        compiled: bool = True,
        record: Callable[[Play[Tensor], Tensor], Play[Tensor]] = recorded,
    ) -> None:
        """Compiles and records, which takes a minute or two the first time on a machine."""
        self._device = device
        network: Any = FusedEncoder(encoder, how).to(device, torch.bfloat16).to(memory_format=torch.channels_last)
        sizes = [clips * FRAMES_PER_CLIP for clips in BATCH_CLIPS]
        on_gpu = device.type == "cuda"
        self._staged = torch.zeros(sizes[-1], how.resize_px, how.resize_px, 3, dtype=torch.uint8, pin_memory=on_gpu)
        with torch.inference_mode():
            examples = {size: self._staged[:size].to(device) for size in sizes}
            if compiled:
                network = _compiled(network, examples[sizes[0]])
            self._play = {size: record(network, example) for size, example in examples.items()}

    @torch.inference_mode()
    def __call__(self, frames: NDArray[np.uint8]) -> Tensor:
        """frames (N, resize_px, resize_px, 3) RGB -> features (N, D), float32, on the GPU."""
        largest = max(self._play)
        parts = [self._features(frames[at : at + largest]) for at in range(0, len(frames), largest)]
        return torch.cat(parts)

    def _features(self, frames: NDArray[np.uint8]) -> Tensor:
        size = min(size for size in self._play if size >= len(frames))
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # until the frames of the call before have gone up
        self._staged[: len(frames)].numpy()[:] = frames
        return self._play[size](self._staged[:size])[: len(frames)].clone()


def _compiled(network: Any, example: Tensor) -> Any:
    """The network through torch's compiler, once for all batch sizes; as it is where that does not work."""
    try:
        faster: Any = torch.compile(network, dynamic=True)
        faster(example)
    except Exception:
        _log.warning("the encoder runs uncompiled, which is slower, as torch.compile fails here", exc_info=True)
        return network
    return faster
