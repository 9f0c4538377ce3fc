"""The network on a GPU: the fused encoder (`fusion.py`) in float16, and both parts captured as CUDA graphs.

float16 gives all of 306 clips of the demo world the caption of float32; bfloat16 gives it to 98 % (both computed on a
CPU). But in float16 numbers beyond 65,504 become infinite: the caller must check for that.

Frames are uploaded as bytes from pinned memory while the frames before are computed. The encoder is compiled and
captured for a few batch sizes; a batch of another size is padded to the next one. The compiler's output can be saved
as bytes, and a process that gets these need not compile again.

The search of a batch is one graph without a synchronisation: it always runs to the longest sentence allowed, because
asking whether all sentences have ended would cost more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from etenet.model.checkpoint import Checkpoint
from etenet.model.config import Preprocessing
from etenet.model.decoder import Decoder
from etenet.model.encoder import Encoder
from etenet.model.generate import beam
from etenet.model.hypothesis import Hypothesis
from etenet.model.search import Sentences
from etenet.model.vocabulary import EOS_ID
from etenet.runtime import GPU_BATCH_CLIPS
from etenet.runtime.cuda.fusion import FusedEncoder
from etenet.runtime.cuda.graph import Replay, capturer
from etenet.runtime.interface import Network, encode_clips
from etenet.runtime.network import TorchNetwork

BATCH_CLIPS = (GPU_BATCH_CLIPS, 8, 4, 2, 1)
BEAM_SIZE = 5

_log = logging.getLogger(__name__)

Upload = Callable[[NDArray[np.uint8], int], Tensor]  # frames and a batch size -> the padded batch on the GPU


class CudaNetwork:
    """One instance serves one thread at a time."""

    batch_clips = few_clips = GPU_BATCH_CLIPS
    precision = "float16"

    def __init__(
        self, checkpoint: Checkpoint, exact: TorchNetwork, *, frames_per_clip: int, kernels: bytes | None = None
    ) -> None:
        """`exact` is the torch form on the same GPU. Compiling takes minutes without the `kernels` of such a GPU."""
        model, device = checkpoint.model, exact.device
        self._exact = exact
        self._encoder = GpuEncoder(
            checkpoint.encoder,
            checkpoint.preprocessing,
            frames_per_clip=frames_per_clip,
            device=device,
            kernels=kernels,
        )
        self._search = GpuSearch(
            model.decoder, max_words=checkpoint.max_words, frames_per_clip=frames_per_clip, device=device
        )

    @property
    def exact(self) -> Network:
        return self._exact

    def features(self, frames: NDArray[np.uint8]) -> Tensor:
        return encode_clips(frames, self._encoder, torch.cat)

    def finite(self, features: Tensor) -> list[bool]:
        return self._exact.finite(features)

    def mean_features(self, features: Sequence[Tensor | NDArray[np.float32]]) -> NDArray[np.float32]:
        return self._exact.mean_features(features)

    def sentences(
        self, features: Sequence[Tensor | NDArray[np.float32]], *, beam_size: int, max_words: int
    ) -> list[list[Hypothesis]]:
        if (beam_size, max_words) == (BEAM_SIZE, self._search.max_words):
            return self._search(self._exact.stacked(features))
        return self._exact.sentences(features, beam_size=beam_size, max_words=max_words)

    def log_probs(self, feature: NDArray[np.float32], sentences: Sequence[Sequence[int]]) -> list[float]:
        return self._exact.log_probs(feature, sentences)

    def recover(self) -> None:
        self._exact.recover()


class GpuEncoder:
    """Resized frames -> features. One instance serves one thread at a time."""

    def __init__(
        self,
        encoder: Encoder,
        preprocessing: Preprocessing,
        *,
        frames_per_clip: int,
        device: torch.device,
        compiled: bool = True,
        kernels: bytes | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        """Compiles, which takes minutes without the `kernels` of such a GPU, and captures."""
        network: Any = FusedEncoder(encoder, preprocessing).to(device, dtype).to(memory_format=torch.channels_last)
        sizes = [clips * frames_per_clip for clips in BATCH_CLIPS]
        shape = sizes[0], preprocessing.resize_px, preprocessing.resize_px, 3
        capture = capturer(device)
        self._upload: Upload = _PinnedUpload(device, shape) if device.type == "cuda" else _padded
        with torch.inference_mode():
            examples = torch.zeros(shape, dtype=torch.uint8, device=device)
            if compiled:
                network = _compiled(network, examples[: sizes[-1]].clone(), kernels)
            self._replay: dict[int, Replay[Tensor]] = {size: capture(network, examples[:size]) for size in sizes}
        torch.cuda.empty_cache()  # trying kernels took memory that others on this GPU may need

    @torch.inference_mode()
    def __call__(self, frames: NDArray[np.uint8]) -> Tensor:
        """frames (N, resize_px, resize_px, 3) RGB -> features (N, D) float32 on the GPU, without synchronising."""
        largest = max(self._replay)
        return torch.cat([self._features(frames[at : at + largest]) for at in range(0, len(frames), largest)])

    def _features(self, frames: NDArray[np.uint8]) -> Tensor:
        size = min(size for size in self._replay if size >= len(frames))
        return self._replay[size](self._upload(frames, size))[: len(frames)].clone()


class GpuSearch:
    """Features -> sentences of at most `max_words`, by a beam of `BEAM_SIZE`. One thread at a time."""

    def __init__(self, decoder: Decoder, *, max_words: int, frames_per_clip: int, device: torch.device) -> None:
        self.max_words = max_words

        def search(features: Tensor) -> Sentences:
            return beam(decoder, features, beam_size=BEAM_SIZE, max_words=max_words, may_stop=False)

        capture, shape = capturer(device), (frames_per_clip, decoder.config.feature_size)
        with torch.inference_mode():
            self._replay: dict[int, Replay[Sentences]] = {
                clips: capture(search, torch.zeros(clips, *shape, device=device)) for clips in BATCH_CLIPS
            }

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> list[list[Hypothesis]]:
        """features (B, L, D) -> the sentences of each clip, best first."""
        largest = max(self._replay)
        parts = [features[at : at + largest] for at in range(0, len(features), largest)]
        return [hypotheses for part in parts for hypotheses in self._hypotheses(part)]

    def _hypotheses(self, features: Tensor) -> list[list[Hypothesis]]:
        clips = min(size for size in self._replay if size >= len(features))
        padded = functional.pad(features, (0, 0, 0, 0, 0, clips - len(features)))
        return self._replay[clips](padded).hypotheses(EOS_ID)[: len(features)]


def compiled_kernels(
    encoder: Encoder, preprocessing: Preprocessing, *, frames_per_clip: int, device: torch.device
) -> bytes:
    """What torch's compiler makes of this network for this GPU. `RuntimeError` if it makes nothing."""
    GpuEncoder(encoder, preprocessing, frames_per_clip=frames_per_clip, device=device)
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is None:
        raise RuntimeError("torch's compiler made nothing that can be saved")
    return artifacts[0]


def _compiled(network: Any, example: Tensor, kernels: bytes | None) -> Any:
    """The network through torch's compiler, once for all batch sizes; unchanged if that fails."""
    if kernels and torch.compiler.load_cache_artifacts(kernels) is None:
        _log.warning("the saved kernels cannot be read; the encoder is compiled again, which takes minutes")
    torch._dynamo.mark_dynamic(example, 0)
    try:
        faster: Any = torch.compile(network)
        faster(example)
    except Exception:
        _log.warning("the encoder runs uncompiled, which is slower: torch.compile fails here", exc_info=True)
        return network
    return faster


def _padded(frames: NDArray[np.uint8], size: int) -> Tensor:
    return functional.pad(torch.from_numpy(frames), (*(0, 0) * 3, 0, size - len(frames)))


class _PinnedUpload:
    """Two buffers in pinned memory: one is filled while the other is uploaded or read."""

    def __init__(self, device: torch.device, shape: tuple[int, ...]) -> None:  # GPU only
        self._device, self._uploads = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._next, self._last = _Buffer.on(device, shape), _Buffer.on(device, shape)

    def __call__(self, frames: NDArray[np.uint8], size: int) -> Tensor:  # GPU only
        """Valid until the next call: whatever reads the result must be launched before."""
        self._next, self._last = self._last, self._next
        computing, buffer = torch.cuda.current_stream(self._device), self._last
        self._next.read.record(computing)
        buffer.uploaded.synchronize()
        buffer.pinned[: len(frames)].copy_(torch.from_numpy(frames))
        with torch.cuda.stream(self._uploads):
            self._uploads.wait_event(buffer.read)
            buffer.frames[: len(frames)].copy_(buffer.pinned[: len(frames)], non_blocking=True)
            buffer.uploaded.record(self._uploads)
        computing.wait_event(buffer.uploaded)
        return buffer.frames[:size]


@dataclass(frozen=True, slots=True)
class _Buffer:
    pinned: Tensor
    frames: Tensor  # on the GPU
    uploaded: torch.cuda.Event
    read: torch.cuda.Event

    @classmethod
    def on(cls, device: torch.device, shape: tuple[int, ...]) -> _Buffer:  # GPU only
        pinned = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        uploaded, read = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        return cls(pinned, pinned.to(device), uploaded, read)
