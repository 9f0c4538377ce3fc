"""The GPU's own video decoder (NVDEC): what it may decode, and how FFmpeg gets at it.

FFmpeg parses the stream as it does for its own decoder, so that its allow-lists and limits hold as they do there; the
GPU gets the pictures. Knows no file: `video.py` opens them, and trusts nothing that comes from here.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from av.codec.context import CodecContext
from av.codec.hwaccel import HWAccel

# AV1 is not here, as the decoder that FFmpeg opens for it (libdav1d) knows no GPU.
GPU_CODECS = ("h264", "hevc", "vp9")
# They come back as NV12 or P010, of which swscale makes the very pixels that it makes of these.
GPU_PICTURES = ("yuv420p", "yuvj420p", "yuv420p10le")
_DRIVER = ("libcuda.so.1", "libnvcuvid.so.1")


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuDecoding:
    """Which videos a GPU's own decoder (NVDEC) takes from the cores.

    Small frames a core decodes faster than they come back from a GPU. That it is the other way round from 1080p on is
    what others publish; `benchmarks.gpu` measures it.
    """

    device: int = 0  # of those that CUDA_VISIBLE_DEVICES leaves
    from_pixels: int = 1920 * 1080  # of a frame

    def __post_init__(self) -> None:
        if self.device < 0:
            raise ValueError(f"device must be a GPU's number, from 0 on, got {self.device}")
        if self.from_pixels <= 0:
            raise ValueError(f"from_pixels must be positive, got {self.from_pixels}")


def accelerator(device: int) -> HWAccel:
    """What makes `av.open` decode on that GPU. All that a process opens share one CUDA context, the primary one."""
    return HWAccel("cuda", device=str(device), allow_software_fallback=False, options={"primary_ctx": "1"})


def hold(device: int) -> object:  # GPU only
    """Load the driver and open the GPU, which stays open as long as the result is kept; `OSError` where there is none.

    Behind the wall neither could be opened anew.
    """
    return [ctypes.CDLL(name) for name in _DRIVER], CodecContext.create("h264", "r", hwaccel=accelerator(device))
