"""The network on a CPU without torch, by OpenVINO: the encoder in about half of torch's time, the search in a third.

The encoder is compiled when a checkpoint is first packaged or captioned with (`kept.py`); after that it is only read.
Frames are computed in requests of the same size (`layout.py`), so a clip's features are the same bits alone and in a
batch. With a thread for each request, no thread waits for another: a core that a decoder process takes delays one, not
all.

Only this file and `int8.py` import openvino. To compile needs torch; to compute does not.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from weakref import WeakSet

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops
from openvino.preprocess import PrePostProcessor

from etenet import metrics
from etenet.errors import UsageError
from etenet.linux import same_signal_stack
from etenet.model.checkpoint import Checkpoint
from etenet.model.config import Preprocessing, crop_start
from etenet.model.hypothesis import Hypothesis
from etenet.runtime import BF16, CPU_BATCH_CLIPS, PACKAGED
from etenet.runtime.decoder import ArrayDecoder, Matrices
from etenet.runtime.interface import Network, encode_clips
from etenet.runtime.layout import CLIP_FRAMES, Layout, layout, measure

# Relative to the largest feature of the torch form. A larger error means another network.
TOLERANCE = 1e-4

_ALL = 2**31 - 1
_compiled = WeakSet["CompiledEncoder | CompiledProducts"]()


def _keep_for_good() -> None:
    """In a forked process, which has no threads of OpenVINO: to destroy what is compiled would wait for them."""
    for one in _compiled:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_keep_for_good)


@cache
def core() -> ov.Core:
    """OpenVINO, once for the process, and without a stack for signals.

    On a processor with AMX its plugin gives the thread another one, and at its end the one before back. If two plugins
    end in the order in which they began, the thread has a freed stack, and the next signal ends the process.
    """
    with same_signal_stack():
        openvino = ov.Core()
        openvino.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin
    return openvino


def processor() -> str:
    return str(core().get_property("CPU", "FULL_DEVICE_NAME"))


class CompiledEncoder:
    """Resized frames -> features. One instance serves one thread at a time."""

    def __init__(self, graph: Path, *, threads: int, bf16: bool = False, laid_out: Layout | None = None) -> None:
        """`graph` is a file of `compile_encoder` or `int8.quantise`. `RuntimeError` if it cannot be read.

        How the frames are laid out is by default what `layout.py` says. With `bf16` a graph in float32 is computed in
        bfloat16; `UsageError` if that is not possible.
        """
        model = core().read_model(graph)
        quantised = any(operation.get_type_name() == "FakeQuantize" for operation in model.get_ops())
        if bf16 and quantised:
            raise UsageError(f"the archive is packaged in int8, which excludes bf16; set precision to {PACKAGED}")
        if bf16 and "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise UsageError(f"this processor has no instructions for bfloat16; set precision to {PACKAGED}")
        self.precision = "int8" if quantised else BF16 if bf16 else "float32"
        laid_out = laid_out or layout(graph, threads, processor())
        if model.input().partial_shape[0].is_dynamic:
            for_frames(model, laid_out.frames)
        self._compiled = core().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": laid_out.streams,
                "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            },
        )
        self._requests = self._new_requests(laid_out.streams)
        _compiled.add(self)

    def __call__(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """frames (N, resize_px, resize_px, 3) RGB -> features (N, D)."""
        at_a_time, size = self._compiled.output().shape
        features = np.empty((len(frames), size), np.float32)
        for start in range(0, len(frames), at_a_time):
            some = frames[start : start + at_a_time]
            filled = np.pad(some, ((0, at_a_time - len(some)), (0, 0), (0, 0), (0, 0)), "edge")
            self._requests.start_async({0: filled}, features[start : start + at_a_time])
        self._requests.wait_all()
        return features

    def renew(self) -> None:
        """After an error. A queue of requests raises the error of one frame for all later frames, too."""
        for request in self._requests:
            with suppress(RuntimeError):
                request.wait()  # its callback needs Python's lock, which this thread holds while the queue is deleted
        self._requests = self._new_requests(len(self._requests))

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """(resize_px, resize_px, 3)"""
        return tuple(self._compiled.input().shape)[1:]

    def _new_requests(self, streams: int) -> ov.AsyncInferQueue:
        requests = ov.AsyncInferQueue(self._compiled, streams)
        requests.set_callback(self._keep)
        return requests

    @staticmethod
    def _keep(request: ov.InferRequest, rows: NDArray[np.float32]) -> None:
        np.copyto(rows, request.get_output_tensor().data[: len(rows)])
        metrics.STEPS.inc()


class CompiledProducts:
    """The products of a step of the decoder. On one thread: more would gain nothing for so few rows."""

    def __init__(self, matrices: Matrices) -> None:
        hidden_size, embedding_size = matrices.of_hidden.shape[1], matrices.to_words.shape[1]
        hidden = ops.parameter([-1, hidden_size], np.float32)
        self._of_hidden = _request([_product(hidden, matrices.of_hidden)], [hidden])
        hidden, rest = (ops.parameter([-1, size], np.float32) for size in (hidden_size, embedding_size))
        outputs = ops.tanh(ops.add(rest, _product(hidden, matrices.output_of_hidden)))
        logits = ops.add(_product(outputs, matrices.to_words), ops.constant(matrices.words_bias[None]))
        self._log_probs = _request([ops.log_softmax(logits, 1)], [hidden, rest])
        _compiled.add(self)

    def of_hidden(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        return _result(self._of_hidden, hidden)

    def log_probs(self, hidden: NDArray[np.float32], outputs: NDArray[np.float32]) -> NDArray[np.float32]:
        return _result(self._log_probs, hidden, outputs)


def _product(vectors: ov.Node, matrix: NDArray[np.float32]) -> ov.Node:
    """vectors (N, X), matrix (Y, X) -> (N, Y)."""
    return ops.matmul(vectors, ops.constant(matrix), False, True)


def _request(results: list[ov.Node], parameters: list[ov.Node]) -> ov.InferRequest:
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return core().compile_model(ov.Model(results, parameters), "CPU", settings).create_infer_request()


def _result(request: ov.InferRequest, *arrays: NDArray[np.float32]) -> NDArray[np.float32]:
    request.infer(list(arrays), share_inputs=True)
    result: NDArray[np.float32] = request.get_output_tensor().data
    return result


class OpenVinoNetwork:
    """A compiled encoder, and the decoder on NumPy with compiled products."""

    batch_clips = CPU_BATCH_CLIPS
    few_clips = 1

    def __init__(self, checkpoint: Checkpoint, encode: CompiledEncoder) -> None:
        """`encode` is that of the checkpoint, which need not have its encoder."""
        arrays = checkpoint.decoder_arrays
        self._decoder = ArrayDecoder(arrays.config, arrays.weights, CompiledProducts)
        self._encode, self.precision = encode, encode.precision

    @property
    def exact(self) -> Network:
        return self

    def features(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        return encode_clips(frames, self._encode, np.concatenate)

    def finite(self, features: NDArray[np.float32]) -> list[bool]:
        return [bool(np.isfinite(of_clip).all()) for of_clip in features]

    def mean_features(self, features: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        means: NDArray[np.float32] = np.stack(features).mean(axis=1)
        return means

    def sentences(
        self, features: Sequence[NDArray[np.float32]], *, beam_size: int, max_words: int
    ) -> list[list[Hypothesis]]:
        return self._decoder.sentences(np.stack(features), beam_size=beam_size, max_words=max_words)

    def log_probs(self, feature: NDArray[np.float32], sentences: Sequence[Sequence[int]]) -> list[float]:
        return self._decoder.log_probs(feature, sentences)

    def recover(self) -> None:
        self._encode.renew()


def compile_encoder(checkpoint: Checkpoint, graph: Path) -> None:
    """Write `graph` (.xml) and the weights beside it (.bin): cropping, normalisation and network in one.

    `RuntimeError` where the outcome does not compute what the plain network does.
    """
    import torch
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    from etenet.model.preprocess import preprocess

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
        expected = encoder(pixels).numpy()
    error = float(np.abs(CompiledEncoder(graph, threads=1)(example) - expected).max() / np.abs(expected).max())
    if not error <= TOLERANCE:
        raise RuntimeError(f"OpenVINO's features of {encoder.name} are off by {error:.1e}")


def measure_layout(graph: Path, threads: int) -> None:
    """Find out and keep which layout of frames is the fastest on this machine."""

    def prepare(laid_out: Layout) -> Callable[[], object]:
        encode = CompiledEncoder(graph, threads=threads, laid_out=laid_out)
        frames = np.zeros((CLIP_FRAMES, *encode.frame_shape), np.uint8)
        encode(frames)
        return partial(encode, frames)

    measure(graph, threads, processor(), prepare)


def save(model: ov.Model, graph: Path) -> None:
    """Write the same bytes in every run: OpenVINO's own names hold a counter."""
    model.set_friendly_name("encoder")
    for number, operation in enumerate(model.get_ordered_ops()):
        operation.set_friendly_name(f"{operation.get_type_name()}_{number}")
    ov.save_model(model, graph, compress_to_fp16=False)


def for_frames(model: ov.Model, frames: int) -> None:
    """Let the graph take so many frames at a time; -1: any number."""
    model.reshape([frames, *model.input().partial_shape[1:]])


def _on_frames(model: ov.Model, preprocessing: Preprocessing) -> ov.Model:
    """The network with the operations of `model/preprocess.py` before it, for any number of frames."""
    start, unit = crop_start(preprocessing), 255 / preprocessing.input_max
    steps = PrePostProcessor(model)
    frame = steps.input()
    frame.tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    frame.tensor().set_shape([-1, preprocessing.resize_px, preprocessing.resize_px, 3])
    frame.model().set_layout(ov.Layout("NCHW"))
    cropped = frame.preprocess().crop(
        [0, start, start, 0], [_ALL, start + preprocessing.crop_px, start + preprocessing.crop_px, 3]
    )
    pixels = cropped.convert_element_type(ov.Type.f32)
    if preprocessing.channels == "BGR":
        pixels = pixels.reverse_channels()
    pixels.mean([value * unit for value in preprocessing.mean]).scale([value * unit for value in preprocessing.std])
    return steps.build()
