"""What computes: resized frames -> features -> sentences. One interface, three forms.

The torch form is here and defines the results. `openvino.py` has the form for CPUs, whose encoder is compiled;
`cuda/` has the form for GPUs, in half precision and captured as CUDA graphs. `load.py` chooses. Knows no video and no
caption.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from etenet import metrics
from etenet.errors import DeviceFailed, UsageError
from etenet.model.checkpoint import Checkpoint
from etenet.model.generate import generate
from etenet.model.preprocess import preprocess
from etenet.model.search import Hypothesis
from etenet.runtime import CPU_BATCH_CLIPS, GPU_BATCH_CLIPS, PACKAGED

# Frames encoded in one call. On a GPU more need more memory and are no faster. On a CPU, a call of the largest network
# must not take so long that the worker seems to hang.
MAX_FRAMES = 256
MAX_FRAMES_ON_CPU = 16
# The cosine of the features of a frame to those of float32. bfloat16 has .9997 where it works.
LEAST_SIMILARITY = 0.999

Encode = Callable[[NDArray[np.uint8]], Tensor]  # frames (N, resize_px, resize_px, 3) -> features (N, D)


class Network(Protocol):
    """Encoder and decoder of one checkpoint, ready to run. One instance serves one thread at a time."""

    batch_clips: int  # how many clips to bring at once where there are many
    precision: str  # what the encoder computes in: float32, float16, bf16 or int8

    @property
    def exact(self) -> Network:
        """The form that clips go to whose numbers leave this form's range; itself if it has float32's range."""

    def features(self, frames: NDArray[np.uint8]) -> Tensor:
        """frames (B, L, resize_px, resize_px, 3) uint8 RGB -> features (B, L, D) float32."""

    def sentences(self, features: Tensor, *, beam_size: int, max_words: int) -> list[list[Hypothesis]]:
        """features (B, L, D) -> the sentences of each clip, best first; none if its probabilities are not finite."""

    def recover(self) -> None:
        """After an error: free the device's memory. Raises `DeviceFailed` if the device no longer computes."""


class TorchNetwork:
    """The network as torch runs it, without changes."""

    precision = "float32"

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._checkpoint = checkpoint
        checkpoint.model.to(self.device).to(memory_format=torch.channels_last).eval()
        self.batch_clips = GPU_BATCH_CLIPS if self.device.type == "cuda" else CPU_BATCH_CLIPS

    @property
    def exact(self) -> Network:
        return self

    def features(self, frames: NDArray[np.uint8]) -> Tensor:
        on_gpu = self.device.type == "cuda"
        return encode_clips(frames, self._encode, max_frames=MAX_FRAMES if on_gpu else MAX_FRAMES_ON_CPU)

    @torch.inference_mode()
    def _encode(self, frames: NDArray[np.uint8]) -> Tensor:
        pixels = preprocess(torch.from_numpy(frames).to(self.device), self._checkpoint.preprocessing)
        features: Tensor = self._checkpoint.encoder(pixels)
        return features

    def sentences(self, features: Tensor, *, beam_size: int, max_words: int) -> list[list[Hypothesis]]:
        return generate(
            self._checkpoint.model.decoder, features.to(self.device), beam_size=beam_size, max_words=max_words
        )

    def recover(self) -> None:
        if self.device.type == "cuda" and (fault := gpu_fault(self.device)):
            raise DeviceFailed(f"{self.device} no longer computes: {fault}")


def require_similar_features(network: Network, exact: Network, frames: NDArray[np.uint8]) -> None:
    """Both networks must agree on frames (L, resize_px, resize_px, 3). Raises `UsageError`."""
    features, expected = network.features(frames[None]), exact.features(frames[None])
    similarity = float(cosine_similarity(features, expected, dim=-1).min())
    if not similarity >= LEAST_SIMILARITY:
        raise UsageError(
            f"in {network.precision} the features of the test clip have a cosine of {similarity:.4f} to those in "
            f"{exact.precision}, and {LEAST_SIMILARITY} is needed; set precision to {PACKAGED}"
        )


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


def encode_clips(frames: NDArray[np.uint8], encode: Encode, *, max_frames: int = MAX_FRAMES) -> Tensor:
    """frames (B, L, resize_px, resize_px, 3) -> features (B, L, D). Of equal consecutive frames one is encoded."""
    clips, length = frames.shape[:2]
    flat = frames.reshape(-1, *frames.shape[2:])
    is_new = [True, *(not _equal(before, frame) for before, frame in pairwise(flat))]
    distinct = flat if all(is_new) else flat[is_new]
    parts = []
    for at in range(0, len(distinct), max_frames):
        parts.append(encode(distinct[at : at + max_frames]))
        metrics.STEPS.inc()
    features = torch.cat(parts)
    if not all(is_new):
        features = features[np.cumsum(is_new) - 1]
    return features.view(clips, length, -1)


def _equal(frame: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Of two frames that differ, the middle rows nearly always differ, so these are compared first."""
    middle = len(frame) // 2
    return np.array_equal(frame[middle], other[middle]) and np.array_equal(frame, other)
