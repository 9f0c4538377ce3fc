"""The network as torch runs it, on a CPU or a GPU: the form that defines the results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etenet.errors import DeviceFailed
from etenet.model.checkpoint import Checkpoint
from etenet.model.generate import generate, log_probs
from etenet.model.hypothesis import Hypothesis
from etenet.model.preprocess import preprocess
from etenet.runtime import CPU_BATCH_CLIPS, GPU_BATCH_CLIPS
from etenet.runtime.interface import MAX_FRAMES, Network, encode_clips

# A call of the largest network must not take so long that the worker seems to hang.
MAX_FRAMES_ON_CPU = 16


class TorchNetwork:
    """Encoder and decoder without changes."""

    precision = "float32"

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._checkpoint = checkpoint
        checkpoint.model.to(self.device).to(memory_format=torch.channels_last).eval()
        on_gpu = self.device.type == "cuda"
        self.batch_clips = GPU_BATCH_CLIPS if on_gpu else CPU_BATCH_CLIPS
        self.few_clips = GPU_BATCH_CLIPS if on_gpu else 1

    @property
    def exact(self) -> Network:
        return self

    def features(self, frames: NDArray[np.uint8]) -> Tensor:
        on_gpu = self.device.type == "cuda"
        max_frames = MAX_FRAMES if on_gpu else MAX_FRAMES_ON_CPU
        return encode_clips(frames, self._encode, torch.cat, max_frames=max_frames)

    @torch.inference_mode()
    def _encode(self, frames: NDArray[np.uint8]) -> Tensor:
        pixels = preprocess(torch.from_numpy(frames).to(self.device), self._checkpoint.preprocessing)
        features: Tensor = self._checkpoint.encoder(pixels)
        return features

    def finite(self, features: Tensor) -> list[bool]:
        of_clips: list[bool] = features.isfinite().flatten(1).all(dim=1).tolist()
        return of_clips

    def mean_features(self, features: Sequence[Tensor | NDArray[np.float32]]) -> NDArray[np.float32]:
        means: NDArray[np.float32] = self.stacked(features).mean(dim=1).cpu().numpy()
        return means

    def sentences(
        self, features: Sequence[Tensor | NDArray[np.float32]], *, beam_size: int, max_words: int
    ) -> list[list[Hypothesis]]:
        decoder = self._checkpoint.model.decoder
        return generate(decoder, self.stacked(features), beam_size=beam_size, max_words=max_words)

    def stacked(self, features: Sequence[Tensor | NDArray[np.float32]]) -> Tensor:
        """Features (L, D) of B clips -> (B, L, D) on the device."""
        return torch.stack([torch.as_tensor(of_clip, device=self.device) for of_clip in features])

    def log_probs(self, feature: NDArray[np.float32], sentences: Sequence[Sequence[int]]) -> list[float]:
        return log_probs(self._checkpoint.model.decoder, torch.from_numpy(feature), sentences)

    def recover(self) -> None:
        if self.device.type == "cuda" and (fault := gpu_fault(self.device)):
            raise DeviceFailed(f"{self.device} no longer computes: {fault}")


def gpu_fault(gpu: torch.device) -> str | None:
    """Why a GPU does not compute, for example because its driver is too old; None if it does. Frees unused memory."""
    try:
        torch.cuda.empty_cache()
        torch.ones(1, device=gpu).add_(1).item()
    except torch.OutOfMemoryError:
        return None
    except Exception as error:
        return str(error).partition("\n")[0]  # the rest is advice to programmers
    return None
