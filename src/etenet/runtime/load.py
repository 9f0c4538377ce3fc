"""A checkpoint -> the fastest form of its network that works here.

If a fast form does not work, the log says why and the torch form is used. torch, OpenVINO and CUDA are imported only
when they are needed.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from etenet.errors import DeviceFailed, UsageError
from etenet.linux import cores
from etenet.model import checkpoint as checkpoints
from etenet.model.checkpoint import Checkpoint
from etenet.runtime import BF16, GRAPH, PACKAGED, PRECISIONS
from etenet.runtime.interface import Network

if TYPE_CHECKING:
    from etenet.runtime.network import TorchNetwork
    from etenet.runtime.openvino import CompiledEncoder

_log = logging.getLogger(__name__)


def load_network(
    path: Path,
    *,
    device: str = "cpu",
    frames_per_clip: int,
    encoder_graph: Path | None = None,
    precision: str = PACKAGED,
    gpu_kernels: Path | None = None,
    capture: bool = False,
) -> tuple[Checkpoint, Network]:
    """A checkpoint and the fastest form of its network that works here. Raises `CheckpointError` and `DeviceFailed`.

    `encoder_graph` is the file that `openvino.compile_encoder` made of this checkpoint, for a CPU, which computes it in
    `precision`, one of `PRECISIONS`; `UsageError` if it cannot. With it, nothing needs torch, and the checkpoint comes
    without its `model`. A GPU has a precision of its own. With `capture` a GPU gets its own form, which takes minutes
    without `gpu_kernels`, the file that `cuda.compiled_kernels` made of this checkpoint on such a GPU.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be {' or '.join(PRECISIONS)}, got {precision!r}")
    on_cpu, bf16 = device == "cpu", precision == BF16
    encode = _openvino_encoder(encoder_graph, bf16=bf16) if on_cpu and encoder_graph else None
    if on_cpu and bf16 and not encode:
        raise UsageError(f"bf16 needs OpenVINO and an encoder compiled by it; set precision to {PACKAGED}")
    if encode:
        from etenet.runtime.openvino import OpenVinoNetwork

        checkpoint = checkpoints.load_arrays(path)
        return checkpoint.without_weights(), OpenVinoNetwork(checkpoint, encode)
    import torch

    from etenet.runtime.network import TorchNetwork

    use_cores()
    checkpoint = checkpoints.load(path)
    try:
        network = TorchNetwork(checkpoint, device=device)
    except torch.OutOfMemoryError as error:
        fix = "end what else uses it, or hide it with CUDA_VISIBLE_DEVICES= to caption on the CPU"
        raise DeviceFailed(f"{device} has too little free memory for the network; {fix}") from error
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        if device.startswith("cuda") and torch.cuda.is_available():
            raise
        raise UsageError(f"this machine has no device {device}; give cpu, or cuda where there is a GPU") from error
    if torch.device(device).type == "cuda" and capture:
        return checkpoint, _cuda_network(checkpoint, network, frames_per_clip, gpu_kernels)
    return checkpoint, network


def working_device(gpu: str) -> str:
    """This GPU; the CPU if it does not compute, and the log says why."""
    import torch

    from etenet.runtime.network import gpu_fault

    if fault := gpu_fault(torch.device(gpu)):
        _log.warning("captions are computed on the CPU, which is slower: %s does not compute (%s)", gpu, fault)
        return "cpu"
    return gpu


def compile_network(checkpoint: Checkpoint) -> Network:
    """The form for a CPU, compiled here and now; the torch form if that fails."""
    use_cores()
    try:
        from etenet.runtime.openvino import CompiledEncoder, OpenVinoNetwork, compile_encoder

        with tempfile.TemporaryDirectory() as folder:
            graph = Path(folder) / GRAPH
            compile_encoder(checkpoint, graph)
            return OpenVinoNetwork(checkpoint, CompiledEncoder(graph, threads=cores()))
    except (ImportError, RuntimeError) as error:
        from etenet.runtime.network import TorchNetwork

        _log.warning("the encoder runs on torch, which is slower: it cannot be compiled (%s)", error)
        return TorchNetwork(checkpoint)


def compiled_encoder(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The files of the encoder compiled for a CPU: `GRAPH` and its weights.

    No files, and the log says why, if OpenVINO is missing or does not compute exactly the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / GRAPH
        try:
            from etenet.runtime.openvino import compile_encoder

            compile_encoder(checkpoint, graph)
        except (ImportError, RuntimeError) as error:
            _log.warning("the encoder is left uncompiled, which is slower on a CPU: %s", error)
            return {}
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _openvino_encoder(graph: Path, *, bf16: bool) -> CompiledEncoder | None:
    try:
        from etenet.runtime.openvino import CompiledEncoder

        return CompiledEncoder(graph, threads=cores(), bf16=bf16)
    except (ImportError, RuntimeError) as error:
        _log.warning("the encoder runs on torch, which is slower: its compiled form cannot be used (%s)", error)
        return None


def use_cores() -> None:
    """torch knows no quota. Who has told it to use fewer threads, in this process or by OMP_NUM_THREADS, wins."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), cores()))


def _cuda_network(checkpoint: Checkpoint, exact: TorchNetwork, frames_per_clip: int, kernels: Path | None) -> Network:
    try:
        from etenet.runtime.cuda import CudaNetwork

        return CudaNetwork(
            checkpoint, exact, frames_per_clip=frames_per_clip, kernels=kernels.read_bytes() if kernels else None
        )
    except Exception:
        _log.warning("the network runs on torch, which is slower: its CUDA form cannot be made", exc_info=True)
        return exact
