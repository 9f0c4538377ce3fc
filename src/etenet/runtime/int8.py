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
import openvino as ov
from numpy.typing import NDArray
from openvino import opset1, opset13
from openvino._offline_transformations import apply_moc_transformations

from etenet.errors import UsageError
from etenet.linux import same_signal_stack
from etenet.runtime.openvino import core, for_frames, save


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
    for_frames(model, 1)
    # Batch normalisation becomes a part of the convolution before it. Else NNCF finds no bias there to correct, and
    # real.pt loses 20 points of CIDEr instead of one.
    apply_moc_transformations(model, cf=False)
    _plain_pools(model)
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
    fold_leftovers(quantised)
    for_frames(quantised, -1)
    save(quantised, out)


def _plain_pools(model: ov.Model) -> None:
    """Pools that also give indices, as PyTorch's do, -> those of opset 1, through which OpenVINO carries bytes."""
    for pool in model.get_ops():
        if pool.get_type_name() != "MaxPool" or pool.get_output_size() < 2 or pool.output(1).get_target_inputs():
            continue
        given = pool.get_attributes()
        plain = opset1.max_pool(
            pool.input_value(0),
            given["strides"],
            given["pads_begin"],
            given["pads_end"],
            given["kernel"],
            given["rounding_type"].removesuffix("_torch"),
            given["auto_pad"],
        )
        if given["dilations"] == [1, 1] and plain.output(0).get_shape() == pool.output(0).get_shape():
            pool.output(0).replace(plain.output(0))


def fold_leftovers(model: ov.Model) -> None:
    """Weights in int8 of layers that OpenVINO computes in float32 nevertheless -> weights in float32.

    It would convert them when it compiles. Where it compiles for several streams, it does so in several threads, and
    one in ten times the layer then computes with something else (OpenVINO 2026.4).
    """
    compiled = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    leftovers = {layer.get_friendly_name() for layer in compiled.get_runtime_model().get_ops() if _converts(layer)}
    for weights in model.get_ops():
        if weights.get_friendly_name() in leftovers:
            (scaled,) = (target.get_node() for target in weights.output(0).get_target_inputs())
            scale = scaled.input_value(1).get_node()
            values = weights.input_value(0).get_node().data.astype(np.float32) * scale.data
            scaled.output(0).replace(opset13.constant(values).output(0))


def _converts(layer: ov.Node) -> bool:
    return bool(layer.get_rt_info()["layerType"].astype(str) == "Convert")
