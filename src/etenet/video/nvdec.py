"""The GPU's own video decoder (NVDEC): what it may decode, and how FFmpeg gets at it.

FFmpeg parses the stream as it does for its own decoder, so its allow-lists and limits hold; only the pictures go to the
GPU. Knows no file: `film.py` opens them and trusts nothing that comes from here.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from av.codec.context import CodecContext
from av.codec.hwaccel import HWAccel

# Not AV1: the decoder that FFmpeg opens for it (libdav1d) knows no GPU.
GPU_CODECS = ("h264", "hevc", "vp9")
# They come back as NV12 or P010, from which swscale makes the same pixels.
GPU_PICTURES = ("yuv420p", "yuvj420p", "yuv420p10le")
_DRIVER = ("libcuda.so.1", "libnvcuvid.so.1")


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuDecoding:
    """Which videos a GPU's own decoder (NVDEC) decodes instead of the cores.

    A core decodes small frames faster than a GPU returns them. Others publish that a GPU is faster from 1080p on;
    `benchmarks.gpu` measures it.
    """

    device: int = 0  # its number among the devices in CUDA_VISIBLE_DEVICES
    from_pixels: int = 1920 * 1080  # of a frame

    def __post_init__(self) -> None:
        if self.device < 0:
            raise ValueError(f"device must be a GPU's number, from 0 on, got {self.device}")
        if self.from_pixels <= 0:
            raise ValueError(f"from_pixels must be positive, got {self.from_pixels}")


def accelerator(device: int) -> HWAccel:
    """Makes `av.open` decode on this GPU. All decoders of a process share one CUDA context, the primary one."""
    return HWAccel("cuda", device=str(device), allow_software_fallback=False, options={"primary_ctx": "1"})


def open_gpu(device: int) -> object:  # GPU only
    """Load the driver and open the GPU. It stays open while the result lives. `OSError` if there is no GPU.

    Neither could be opened behind the system-call filter.
    """
    return [ctypes.CDLL(name) for name in _DRIVER], CodecContext.create("h264", "r", hwaccel=accelerator(device))
