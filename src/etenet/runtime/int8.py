"""A compiled graph in float32 -> the same in int8, by NNCF's post-training quantisation. Needs the extra `int8`.

Weights take 7 of the 8 bits. A processor without VNNI adds products of bytes in 16 bits, which 8-bit weights overflow,
silently: features of Inception-ResNet-v2 then have a cosine of .954 to those of float32, instead of .995. An archive is
packaged on one machine and served on another, so it is never left to the one that packages.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from openvino._offline_transformations import apply_moc_transformations

from etenet.errors import UsageError
from etenet.linux import same_signal_stack
from etenet.runtime.openvino import core, save


def require_nncf() -> None:
    """Raises `UsageError` if NNCF is not installed."""
    try:
        with redirect_stdout(sys.stderr):  # where its log goes is decided at its import
            import nncf  # noqa: F401
    except ImportError as error:
        raise UsageError(f"--int8 needs the extra: pip install 'etenet[int8]' ({error})") from error


def quantise(graph: Path, out: Path, frames: NDArray[np.uint8], *, careful: bool) -> None:
    """Write `out` (.xml, and .bin beside it), `graph` in int8. Raises `UsageError` without NNCF.

    frames (N, resize_px, resize_px, 3) RGB, of clips like those to come: what the layers give for them sets the ranges,
    and how biases are corrected. With `careful` a bias is corrected by what all layers before it give in int8, which
    takes several times as long, instead of by the means of its own layer.
    """
    require_nncf()
    model = core().read_model(graph)
    # Batch normalisation becomes a part of the convolution before it. Else NNCF finds no bias there to correct, and
    # real.pt loses 20 points of CIDEr instead of one.
    apply_moc_transformations(model, cf=False)
    with redirect_stdout(sys.stderr), same_signal_stack():  # NNCF loads OpenVINO's plugin again and again
        import nncf

        quantised = nncf.quantize(
            model,
            nncf.Dataset([frame[None] for frame in frames]),
            subset_size=len(frames),
            target_device=nncf.TargetDevice.CPU,
            fast_bias_correction=not careful,
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )
    save(quantised, out)
