"""`python -m benchmarks.capacity`: what a caption costs in processor time, by part and network, in float32 and int8.

Real clips are decoded in one thread. A part does all clips before the next part begins: threads of the part before may
still spin for a moment, and a clip's processor time is that of the whole process. What the server adds is in
`benchmarks.server`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.rig import command
from benchmarks.rig.timing import cost
from benchmarks.rig.untrained import never_ending, untrained
from etenet.captioning.captioner import Captioner, decoders_for
from etenet.captioning.options import CaptionOptions
from etenet.errors import UsageError
from etenet.model import checkpoint as checkpoints
from etenet.model.checkpoint import Checkpoint
from etenet.model.encoder import default_preprocessing
from etenet.runtime import int8
from etenet.runtime.openvino import CompiledEncoder, OpenVinoNetwork, compile_encoder
from etenet.video.clip import FRAMES_PER_CLIP
from etenet.video.sampling import sample_frames

ENCODER, WORDS = "inceptionresnetv2", 12_000
SHIPPED = {"demo.pt": Path("model_store/demo.pt"), "real.pt": Path("model_store/real.pt")}
MILLION, S_PER_HOUR = 10**6, 3600
CALIBRATING = 4  # clips


def full(frames: np.ndarray[Any, np.dtype[np.uint8]]) -> Checkpoint:
    """The network of the paper, untrained: every sentence has 20 words, so this is the most that a search costs."""
    return never_ending(untrained(ENCODER, None, torch.from_numpy(frames), words=WORDS))


def cost_of(checkpoint: Checkpoint, bodies: Sequence[bytes], rounds: int) -> dict[str, float]:
    """Seconds of processor time for each part of a caption: medians."""
    decode = partial(sample_frames, resize_px=checkpoint.preprocessing.resize_px)
    clips = [decode(body).frames for body in bodies]
    with tempfile.TemporaryDirectory() as folder:
        graphs = {"encode": Path(folder) / "float32.xml", "encode in int8": Path(folder) / "int8.xml"}
        compile_encoder(checkpoint, graphs["encode"])
        calibrating = np.concatenate(clips[:CALIBRATING])
        int8.quantise(graphs["encode"], graphs["encode in int8"], calibrating, careful=False)
        encoders = {name: CompiledEncoder(graph, threads=torch.get_num_threads()) for name, graph in graphs.items()}
        network = OpenVinoNetwork(checkpoint, encoders["encode"])
    captioner = Captioner(checkpoint, network, decoders_for(checkpoint, sandboxed=False))
    features = [network.features(frames[None]) for frames in clips]
    parts: dict[str, Callable[[int], object]] = {
        "decode": lambda number: decode(bodies[number]),
        **{name: partial(_encoded, encode, clips) for name, encode in encoders.items()},
        "search": lambda number: captioner.caption_features(features[number], CaptionOptions()),
    }
    seconds = {
        name: [cost(partial(run, number % len(bodies))).cpu_s for number in range(rounds * len(bodies))]
        for name, run in parts.items()
    }
    return {name: statistics.median(of_part) for name, of_part in seconds.items()}


def _encoded(encode: CompiledEncoder, clips: Sequence[NDArray[np.uint8]], number: int) -> NDArray[np.float32]:
    return encode(clips[number])


def summary(seconds: dict[str, float], price: float) -> dict[str, Any]:
    """With the core hours and the money for a million clips."""
    in_all = {
        "float32": seconds["decode"] + seconds["encode"] + seconds["search"],
        "int8": seconds["decode"] + seconds["encode in int8"] + seconds["search"],
    }
    hours = {form: MILLION * of_clip / S_PER_HOUR for form, of_clip in in_all.items()}
    return {
        "cpu_ms": {part: round(1000 * of_part, 2) for part, of_part in seconds.items()},
        "core_hours_per_million": {form: round(of_million, 1) for form, of_million in hours.items()},
        "dollars_per_million": {form: round(price * of_million, 2) for form, of_million in hours.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=__doc__.splitlines()[0])
    reference = os.environ.get("ETENET_REFERENCE_DATA")
    parser.add_argument(
        "--clips", type=Path, metavar="DIR", default=Path(reference) / "msrvtt" / "clips" if reference else None
    )
    parser.add_argument("--networks", nargs="+", choices=[*SHIPPED, "full"], default=[*SHIPPED, "full"])
    parser.add_argument(
        "--price", type=float, default=0.04, metavar="D", help="dollars for a core hour (default: 0.04)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    options, results = command.start(parser, arguments)
    if not options.clips:
        raise UsageError("name a folder of clips with --clips, or set ETENET_REFERENCE_DATA")
    bodies = [path.read_bytes() for path in sorted(options.clips.iterdir())]
    size_px = default_preprocessing(ENCODER).resize_px
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES_PER_CLIP, size_px, size_px, 3), dtype=np.uint8)
    networks = {}
    for name in options.networks:
        checkpoint = checkpoints.load(SHIPPED[name]) if name in SHIPPED else full(frames)
        networks[name] = summary(cost_of(checkpoint, bodies, options.rounds), options.price)
        print(f"{name}: {networks[name]}", flush=True)
    results.conclude("capacity", {"clips": len(bodies), "dollars_per_core_hour": options.price, "networks": networks})


if __name__ == "__main__":
    command.run("capacity", main)
