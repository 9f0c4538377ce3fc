"""What computes: resized frames -> features -> sentences. One interface, three forms.

The torch form is here and defines the results. `openvino.py` has the form for CPUs, whose encoder is compiled;
`cuda.py` has the form for GPUs, in half precision and captured as CUDA graphs. Knows no video and no caption.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etenet.errors import DeviceFailed
from etenet.files import sha256
from etenet.model import checkpoint as checkpoints
from etenet.model.checkpoint import Checkpoint
from etenet.model.generate import generate
from etenet.model.preprocess import preprocess
from etenet.model.search import Hypothesis
from etenet.runtime import CPU_BATCH_CLIPS, GPU_BATCH_CLIPS

_log = logging.getLogger(__name__)

MAX_FRAMES = 256  # encoded in one call: more need more memory and are no faster

Encode = Callable[[NDArray[np.uint8]], Tensor]  # frames (N, resize_px, resize_px, 3) -> features (N, D)


class Network(Protocol):
    """Encoder and decoder of one checkpoint, ready to run. One instance serves one thread at a time."""

    batch_clips: int  # how many clips to bring at once where there are many

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

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._checkpoint = checkpoint
        checkpoint.model.to(self.device).to(memory_format=torch.channels_last).eval()
        self.batch_clips = GPU_BATCH_CLIPS if self.device.type == "cuda" else CPU_BATCH_CLIPS

    @property
    def exact(self) -> Network:
        return self

    def features(self, frames: NDArray[np.uint8]) -> Tensor:
        return encode_clips(frames, self._encode)

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
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.empty_cache()
            torch.ones(1, device=self.device).add_(1).item()
        except torch.OutOfMemoryError:
            return
        except Exception as error:
            raise DeviceFailed(f"{self.device} no longer computes: {error}") from error


def encode_clips(frames: NDArray[np.uint8], encode: Encode) -> Tensor:
    """frames (B, L, resize_px, resize_px, 3) -> features (B, L, D). Of equal consecutive frames one is encoded."""
    clips, length = frames.shape[:2]
    flat = frames.reshape(-1, *frames.shape[2:])
    is_new = [True, *(not _equal(before, frame) for before, frame in pairwise(flat))]
    distinct = flat if all(is_new) else flat[is_new]
    features = torch.cat([encode(distinct[at : at + MAX_FRAMES]) for at in range(0, len(distinct), MAX_FRAMES)])
    if not all(is_new):
        features = features[np.cumsum(is_new) - 1]
    return features.view(clips, length, -1)


def _equal(frame: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Of two frames that differ, the middle rows nearly always differ, so these are compared first."""
    middle = len(frame) // 2
    return np.array_equal(frame[middle], other[middle]) and np.array_equal(frame, other)


def load_network(
    path: Path,
    *,
    device: str = "cpu",
    frames_per_clip: int,
    encoder_graph: Path | None = None,
    gpu_kernels: Path | None = None,
    capture: bool = False,
) -> tuple[Checkpoint, Network]:
    """A checkpoint and the fastest form of its network that works here. Raises `CheckpointError`.

    `encoder_graph` is the file that `openvino.compile_encoder` made of this checkpoint, for a CPU. With `capture` a GPU
    gets its own form, which takes minutes without `gpu_kernels`, the file that `cuda.compiled_kernels` made of this
    checkpoint on such a GPU. If a fast form does not work, the log says why and the torch form is returned.
    """
    on_gpu = torch.device(device).type == "cuda"
    encode = _openvino_encoder(encoder_graph) if encoder_graph and not on_gpu else None
    checkpoint = replace(checkpoints.load(path, with_encoder=encode is None), id=f"sha256:{sha256(path)}")
    if encode:
        from etenet.runtime.openvino import OpenVinoNetwork

        return checkpoint, OpenVinoNetwork(checkpoint, encode)
    network = TorchNetwork(checkpoint, device=device)
    if on_gpu and capture:
        return checkpoint, _cuda_network(checkpoint, network, frames_per_clip, gpu_kernels)
    return checkpoint, network


def compile_network(checkpoint: Checkpoint) -> Network:
    """The form for a CPU, compiled here and now; the torch form if that fails."""
    try:
        from etenet.runtime.openvino import CompiledEncoder, OpenVinoNetwork, compile_encoder

        with tempfile.TemporaryDirectory() as folder:
            graph = Path(folder) / "encoder.xml"
            compile_encoder(checkpoint, graph)
            return OpenVinoNetwork(checkpoint, CompiledEncoder(graph, threads=torch.get_num_threads()))
    except (ImportError, RuntimeError) as error:
        _log.warning("the encoder runs on torch, which is slower: it cannot be compiled (%s)", error)
        return TorchNetwork(checkpoint)


def _openvino_encoder(graph: Path) -> Encode | None:
    try:
        from etenet.runtime.openvino import CompiledEncoder

        return CompiledEncoder(graph, threads=torch.get_num_threads())
    except (ImportError, RuntimeError) as error:
        _log.warning("the encoder runs on torch, which is slower: its compiled form cannot be used (%s)", error)
        return None


def _cuda_network(checkpoint: Checkpoint, exact: TorchNetwork, frames_per_clip: int, kernels: Path | None) -> Network:
    try:
        from etenet.runtime.cuda import CudaNetwork

        return CudaNetwork(
            checkpoint, exact, frames_per_clip=frames_per_clip, kernels=kernels.read_bytes() if kernels else None
        )
    except Exception:
        _log.warning("the network runs on torch, which is slower: its CUDA form cannot be made", exc_info=True)
        return exact
