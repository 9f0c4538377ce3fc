"""The network on a CPU, its encoder compiled by OpenVINO: the features of `model/encoder.py` in about half the time.

The encoder is compiled when a checkpoint is packaged, and a worker only reads the result. Frames are computed one by
one, as many at a time as there are threads, so a clip's features are the same bits alone and in a batch, and no thread
waits for another: a core that a decoder process takes delays one frame, not all.

Only this file and `int8.py` import openvino.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from openvino.preprocess import PrePostProcessor

from etenet import metrics
from etenet.errors import UsageError
from etenet.model.checkpoint import Checkpoint
from etenet.model.config import Preprocessing
from etenet.model.generate import generate
from etenet.model.preprocess import crop_start, preprocess
from etenet.model.search import Hypothesis
from etenet.runtime import BF16, CPU_BATCH_CLIPS, PACKAGED
from etenet.runtime.network import Network, encode_clips

# Relative to the largest feature of the torch form. A larger error means another network.
TOLERANCE = 1e-4


class CompiledEncoder:
    """Resized frames -> features. One instance serves one thread at a time."""

    def __init__(self, graph: Path, *, threads: int, bf16: bool = False) -> None:
        """`graph` is a file of `compile_encoder` or `int8.quantise`. `RuntimeError` if it cannot be read.

        With `bf16` a graph in float32 is computed in bfloat16; `UsageError` if that is not possible.
        """
        core = ov.Core()
        model = core.read_model(graph)
        quantised = any(operation.get_type_name() == "FakeQuantize" for operation in model.get_ops())
        if bf16 and quantised:
            raise UsageError(f"the archive is packaged in int8, which excludes bf16; set precision to {PACKAGED}")
        if bf16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise UsageError(f"this processor has no instructions for bfloat16; set precision to {PACKAGED}")
        self.precision = "int8" if quantised else BF16 if bf16 else "float32"
        self._compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": threads,
                "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            },
        )
        self._requests = ov.AsyncInferQueue(self._compiled, threads)
        self._requests.set_callback(self._keep)

    def __call__(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        """frames (N, resize_px, resize_px, 3) RGB -> features (N, D)."""
        features = np.empty((len(frames), self._compiled.output().shape[1]), np.float32)
        for number in range(len(frames)):
            self._requests.start_async({0: frames[number : number + 1]}, features[number])
        self._requests.wait_all()
        return torch.from_numpy(features)

    @staticmethod
    def _keep(request: ov.InferRequest, row: NDArray[np.float32]) -> None:
        np.copyto(row, request.get_output_tensor().data[0])
        metrics.STEPS.inc()


class OpenVinoNetwork:
    """A compiled encoder, and the decoder on torch."""

    batch_clips = CPU_BATCH_CLIPS

    def __init__(self, checkpoint: Checkpoint, encode: CompiledEncoder) -> None:
        """`encode` is that of the checkpoint, which need not have its encoder."""
        self._decoder, self._encode, self.precision = checkpoint.model.decoder, encode, encode.precision

    @property
    def exact(self) -> Network:
        return self

    def features(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        return encode_clips(frames, self._encode)

    def sentences(self, features: torch.Tensor, *, beam_size: int, max_words: int) -> list[list[Hypothesis]]:
        return generate(self._decoder, features, beam_size=beam_size, max_words=max_words)

    def recover(self) -> None:
        """A CPU needs nothing."""


def compile_encoder(checkpoint: Checkpoint, graph: Path) -> None:
    """Write `graph` (.xml) and the weights beside it (.bin): cropping, normalisation and network in one.

    `RuntimeError` where the outcome does not compute what the plain network does.
    """
    preprocessing, encoder = checkpoint.preprocessing, checkpoint.encoder.eval()
    example = np.random.default_rng(0).integers(
        0, 256, (2, preprocessing.resize_px, preprocessing.resize_px, 3), dtype=np.uint8
    )
    pixels = preprocess(torch.from_numpy(example), preprocessing)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # tracing is deprecated, but OpenVINO itself uses it
        traced = TorchScriptPythonDecoder(encoder, example_input=pixels[:1])
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = _on_frames(frontend.convert(frontend.load(traced)), preprocessing)
        save(model, graph)
        expected = encoder(pixels)
    error = float((CompiledEncoder(graph, threads=1)(example) - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise RuntimeError(f"OpenVINO's features of {encoder.name} are off by {error:.1e}")


def save(model: ov.Model, graph: Path) -> None:
    """Write the same bytes in every run: OpenVINO's own names hold a counter."""
    model.set_friendly_name("encoder")
    for number, operation in enumerate(model.get_ordered_ops()):
        operation.set_friendly_name(f"{operation.get_type_name()}_{number}")
    ov.save_model(model, graph, compress_to_fp16=False)


def _on_frames(model: ov.Model, preprocessing: Preprocessing) -> ov.Model:
    """The network with the operations of `model/preprocess.py` before it, for one frame."""
    start, unit = crop_start(preprocessing), 255 / preprocessing.input_max
    steps = PrePostProcessor(model)
    frame = steps.input()
    frame.tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    frame.tensor().set_shape([1, preprocessing.resize_px, preprocessing.resize_px, 3])
    frame.model().set_layout(ov.Layout("NCHW"))
    cropped = frame.preprocess().crop(
        [0, start, start, 0], [1, start + preprocessing.crop_px, start + preprocessing.crop_px, 3]
    )
    pixels = cropped.convert_element_type(ov.Type.f32)
    if preprocessing.channels == "BGR":
        pixels = pixels.reverse_channels()
    pixels.mean([value * unit for value in preprocessing.mean]).scale([value * unit for value in preprocessing.std])
    return steps.build()
