"""`python -m benchmarks.encoder`: 16 frames -> 16 features on a CPU, by ours and by other engines.

All start from decoded frames: uint8, before crop and normalisation. Ours does both inside the compiled network, the
others with torch (`model/preprocess.py`, whose time is also reported). The ceiling is the time that the machine's
matrix product (torch.mm, 2048 x 2048, float32) would take for the network's multiplications. An engine can be faster
than this if it multiplies faster or avoids multiplications. In int8, and in bf16 where the processor has it, ours is
compared with itself in float32; what that does to captions, `etenet package --int8` says.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch
from numpy.typing import NDArray

from benchmarks.rig import command
from benchmarks.rig.chip import clip_flops
from benchmarks.rig.timing import medians_s
from benchmarks.rig.untrained import untrained
from etenet.errors import UsageError
from etenet.model.checkpoint import Checkpoint
from etenet.model.encoder import default_preprocessing
from etenet.model.preprocess import preprocess
from etenet.runtime import int8
from etenet.runtime.openvino import CompiledEncoder, compile_encoder, core, measure_layout
from etenet.video.clip import FRAMES_PER_CLIP

MATRIX = 2048
PEERS = ("ONNX Runtime", "OpenVINO, its hint for latency", "OpenVINO, its hint for throughput")

Features = NDArray[np.float32]


def contenders(checkpoint: Checkpoint, frames: NDArray[np.uint8], folder: Path) -> dict[str, Callable[[], Features]]:
    encoder, threads = checkpoint.encoder, torch.get_num_threads()

    def ready() -> torch.Tensor:
        return preprocess(torch.from_numpy(frames), checkpoint.preprocessing).contiguous()

    pixels = ready()

    compile_encoder(checkpoint, folder / "ours.xml")
    measure_layout(folder / "ours.xml", threads)  # as `etenet package` does
    ours = CompiledEncoder(folder / "ours.xml", threads=threads)
    int8.quantise(folder / "ours.xml", folder / "int8.xml", frames, careful=False)
    measure_layout(folder / "int8.xml", threads)
    cheaper = {"ours, int8": CompiledEncoder(folder / "int8.xml", threads=threads)}
    with suppress(UsageError):  # not every processor can
        cheaper["ours, bf16"] = CompiledEncoder(folder / "ours.xml", threads=threads, bf16=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about torch's own code
        torch.onnx.export(encoder, (pixels,), folder / "network.onnx", dynamo=True, verbose=False)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(folder / "network.onnx", settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def by_openvino(hint: str) -> Callable[[], Features]:
        """As in its documentation: the whole batch at once for latency, a queue of frames for throughput."""
        model = core().read_model(folder / "network.onnx")
        whole = hint == "LATENCY"
        model.reshape([len(frames) if whole else 1, *pixels.shape[1:]])
        exact = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": hint}
        compiled = core().compile_model(model, "CPU", exact)
        if whole:
            return lambda: compiled(ready().numpy())[0]
        queue = openvino.AsyncInferQueue(compiled)
        features = np.empty((len(frames), compiled.output().shape[1]), np.float32)
        queue.set_callback(lambda request, row: np.copyto(features[row], request.get_output_tensor().data[0]))

        def run() -> Features:
            values = ready().numpy()
            for row in range(len(values)):
                queue.start_async({0: values[row : row + 1]}, row)
            queue.wait_all()
            return features

        return run

    @torch.inference_mode()
    def eager() -> Features:
        features: Features = encoder(ready()).numpy()
        return features

    return {
        "ours": partial(ours, frames),
        **{name: partial(encode, frames) for name, encode in cheaper.items()},
        "eager torch": eager,
        PEERS[0]: lambda: session.run(None, {name: ready().numpy()})[0],
        PEERS[1]: by_openvino("LATENCY"),
        PEERS[2]: by_openvino("THROUGHPUT"),
        "crop and normalisation by torch": lambda: ready().numpy(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encoder", description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="inceptionresnetv2")
    parser.add_argument("--crop-px", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    options, results = command.start(parser, arguments)
    size_px = default_preprocessing(options.encoder, crop_px=options.crop_px).resize_px
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES_PER_CLIP, size_px, size_px, 3), dtype=np.uint8)
    checkpoint = untrained(options.encoder, options.crop_px, torch.from_numpy(frames))
    with tempfile.TemporaryDirectory() as folder:
        runs = contenders(checkpoint, frames, Path(folder))
        expected = runs["eager torch"]().copy()
        error = float(np.abs(runs["ours"]() - expected).max() / np.abs(expected).max())
        for name in PEERS:
            np.testing.assert_allclose(runs[name](), expected, atol=1e-3 * np.abs(expected).max(), err_msg=name)
        a, b = torch.randn(2, MATRIX, MATRIX)
        medians = medians_s({**runs, "ceiling": lambda: torch.mm(a, b)}, options.rounds)
    flops = clip_flops(checkpoint.encoder, checkpoint.preprocessing.crop_px)
    medians["ceiling"] *= flops / (2 * MATRIX**3)
    for name, median in medians.items():
        print(f"{name:36} {1000 * median:8.1f} ms")
    results.conclude(
        "encoder",
        {
            "encoder": options.encoder,
            "threads": torch.get_num_threads(),
            "median_ms": {name: round(1000 * median, 2) for name, median in medians.items()},
            "ratios_to_float32": {
                name: median / medians["ours"] for name, median in medians.items() if name.startswith("ours, ")
            },
            "ratio_to_best_peer": medians["ours"] / min(medians[name] for name in PEERS),
            "ratio_to_eager": medians["ours"] / medians["eager torch"],
            "ratio_to_sgemm": medians["ours"] / medians["ceiling"],
            "max_relative_error": error,
        },
    )


if __name__ == "__main__":
    command.run("encoder", main)
