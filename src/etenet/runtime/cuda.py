"""phi on a GPU: resized frames -> features, by the fused network (`fused_encoder.py`) in float16, channels last.

Of 306 clips of the demo world float16 gives each the caption of float32, bfloat16 98 in 100 (computed on a CPU); in
return, numbers beyond 65,504 become infinite: whoever asks must look for that.

Frames go up as bytes from pinned memory, while those before are computed. The network is compiled, and recorded for a
few batch sizes; a batch of another size is filled up to the next one. What the compiler made can be kept as bytes: a
process that is given them need not compile again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from etenet.model.config import Preprocessing
from etenet.model.decoder import Decoder
from etenet.model.encoder import Encoder
from etenet.model.generate import beam
from etenet.model.search import Hypothesis, Sentences, Words
from etenet.runtime.cuda_graph import Play, recorder
from etenet.runtime.fusion import FusedEncoder

BATCH_FRAMES = (256, 128, 64, 32, 16)
_log = logging.getLogger(__name__)

Upload = Callable[[NDArray[np.uint8], int], Tensor]  # frames and how many there shall be -> so many, on the GPU


class GpuEncoder:
    """One instance serves one thread at a time."""

    half = True

    def __init__(
        self,
        encoder: Encoder,
        how: Preprocessing,
        *,
        device: torch.device,
        compiled: bool = True,
        kernels: bytes | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> None:
        """Compiles, which takes minutes without the `kernels` of such a GPU, and records."""
        network: Any = FusedEncoder(encoder, how).to(device, dtype).to(memory_format=torch.channels_last)
        shape = BATCH_FRAMES[0], how.resize_px, how.resize_px, 3
        record = recorder(device)
        self._upload: Upload = _PinnedUpload(device, shape) if device.type == "cuda" else _filled_up
        with torch.inference_mode():
            examples = torch.zeros(shape, dtype=torch.uint8, device=device)
            if compiled:
                network = _compiled(network, examples[: BATCH_FRAMES[-1]].clone(), kernels)
            self._play: dict[int, Play[Tensor]] = {size: record(network, examples[:size]) for size in BATCH_FRAMES}
        torch.cuda.empty_cache()  # what trying kernels took, for who else is on this GPU

    @torch.inference_mode()
    def __call__(self, frames: NDArray[np.uint8]) -> Tensor:
        """frames (N, resize_px, resize_px, 3) RGB -> features (N, D), float32, on the GPU, which is not waited for."""
        largest = max(self._play)
        parts = [self._features(frames[at : at + largest]) for at in range(0, len(frames), largest)]
        return torch.cat(parts)

    def _features(self, frames: NDArray[np.uint8]) -> Tensor:
        size = min(size for size in self._play if size >= len(frames))
        return self._play[size](self._upload(frames, size))[: len(frames)].clone()


def compiled_kernels(encoder: Encoder, how: Preprocessing, *, device: torch.device) -> bytes:
    """What torch's compiler makes of this network for this GPU; `RuntimeError` where it makes nothing."""
    GpuEncoder(encoder, how, device=device)
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        raise RuntimeError("torch's compiler left nothing to keep")
    return saved[0]


def _compiled(network: Any, example: Tensor, kernels: bytes | None) -> Any:
    """The network through torch's compiler, once for all batch sizes; as it is where that does not work."""
    if kernels and torch.compiler.load_cache_artifacts(kernels) is None:
        _log.warning("what was compiled before cannot be read; it is compiled again, which takes minutes")
    torch._dynamo.mark_dynamic(example, 0)
    try:
        faster: Any = torch.compile(network)
        faster(example)
    except Exception:
        _log.warning("the encoder runs uncompiled, which is slower, as torch.compile fails here", exc_info=True)
        return network
    return faster


def _filled_up(frames: NDArray[np.uint8], size: int) -> Tensor:
    return functional.pad(torch.from_numpy(frames), (*(0, 0) * 3, 0, size - len(frames)))


class _PinnedUpload:
    """Through two places in pinned memory: one is filled while the other goes up or is read."""

    def __init__(self, device: torch.device, shape: tuple[int, ...]) -> None:  # GPU only
        self._device, self._uploads = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._next, self._last = _Place.on(device, shape), _Place.on(device, shape)

    def __call__(self, frames: NDArray[np.uint8], size: int) -> Tensor:  # GPU only
        """Good until the next call; what reads it must have been launched by then."""
        self._next, self._last = self._last, self._next
        computing, place = torch.cuda.current_stream(self._device), self._last
        self._next.read.record(computing)
        place.gone_up.synchronize()
        place.pinned[: len(frames)].copy_(torch.from_numpy(frames))
        with torch.cuda.stream(self._uploads):
            self._uploads.wait_event(place.read)
            place.frames[: len(frames)].copy_(place.pinned[: len(frames)], non_blocking=True)
            place.gone_up.record(self._uploads)
        computing.wait_event(place.gone_up)
        return place.frames[:size]


@dataclass(frozen=True, slots=True)
class _Place:
    pinned: Tensor
    frames: Tensor  # on the GPU
    gone_up: torch.cuda.Event
    read: torch.cuda.Event

    @classmethod
    def on(cls, device: torch.device, shape: tuple[int, ...]) -> _Place:  # GPU only
        pinned = torch.zeros(shape, dtype=torch.uint8, pin_memory=True)
        gone_up, read = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        return cls(pinned, pinned.to(device), gone_up, read)


RECORDED_BEAM_SIZE = 5
RECORDED_CLIPS = (16, 8, 4, 2, 1)


class GpuSearch:
    """The same for sentences of `max_words` and `RECORDED_BEAM_SIZE`. One instance serves one thread at a time."""

    def __init__(
        self, decoder: Decoder, *, max_words: int, words: Words, frames_per_clip: int, device: torch.device
    ) -> None:
        self.max_words, self._eos = max_words, words.eos

        def said(features: Tensor) -> Sentences:
            size = RECORDED_BEAM_SIZE
            return beam(decoder, features, beam_size=size, max_words=max_words, words=words, may_stop=False)

        record = recorder(device)
        with torch.inference_mode():
            shape = frames_per_clip, decoder.config.feature_size
            self._play: dict[int, Play[Sentences]] = {
                clips: record(said, torch.zeros(clips, *shape, device=device)) for clips in RECORDED_CLIPS
            }

    def finds(self, beam_size: int, max_words: int) -> bool:
        return (beam_size, max_words) == (RECORDED_BEAM_SIZE, self.max_words)

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> list[list[Hypothesis]]:
        """features (B, L, D) -> the sentences of each clip, best first."""
        most = max(self._play)
        return [found for at in range(0, len(features), most) for found in self._found(features[at : at + most])]

    def _found(self, features: Tensor) -> list[list[Hypothesis]]:
        clips = min(size for size in self._play if size >= len(features))
        filled = functional.pad(features, (0, 0, 0, 0, 0, clips - len(features)))
        return self._play[clips](filled).hypotheses(self._eos)[: len(features)]
