"""`python -m benchmarks.search`: beam search over a large vocabulary, beside a plain loop over beams and the encoder.

The loop takes one beam and one word at a time, as most published code does. Both must find the same sentences.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers.plain import Beam, search_by_loop
from benchmarks.rig.record import RESULTS, conclude
from etenet.captioning.captioner import Captioner
from etenet.captioning.options import CaptionOptions
from etenet.errors import EtenetError
from etenet.model import checkpoint as checkpoints
from etenet.model.vocabulary import EOS_ID, Vocabulary
from etenet.runtime.openvino import CompiledEncoder, compile_encoder

CLIPS = 16
FRAMES = 16


def captioner(encoder: str, words: int, max_words: int, folder: Path) -> Captioner:
    """A random network whose sentences end at the last word and no sooner, so that every search is of full length."""
    torch.manual_seed(0)
    vocabulary = Vocabulary([f"word{number}" for number in range(words)])
    checkpoint = checkpoints.initialise(encoder, vocabulary, max_words=max_words)
    with torch.no_grad():
        checkpoint.model.decoder.to_words.bias[EOS_ID] = -30.0
        checkpoint.model.decoder.to_words.weight.mul_(4.0)  # or nearly all words would be equally probable
    compile_encoder(checkpoint, folder / "encoder.xml")
    compiled = CompiledEncoder(folder / "encoder.xml", threads=torch.get_num_threads())
    return Captioner(checkpoint, sandboxed=False, compiled_encoder=compiled)


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def same(captioned: Sequence[object], looped: Sequence[Sequence[Beam]], captioner: Captioner) -> bool:
    tokens = captioner.checkpoint.vocabulary.tokens
    for sentences, beams in zip(captioned, looped, strict=True):
        for said, beam in zip(sentences, beams, strict=True):
            if said.words != tuple(tokens(beam.words[:-1])) or not math.isclose(
                said.log_prob, beam.log_prob, rel_tol=1e-4
            ):
                return False
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="inceptionresnetv2")
    parser.add_argument("--words", type=int, default=12_000)
    parser.add_argument("--max-words", type=int, default=20)
    parser.add_argument("--beam-size", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        ours = captioner(options.encoder, options.words, options.max_words, Path(folder))
    decoder = ours.checkpoint.model.decoder
    features = torch.randn(CLIPS, FRAMES, decoder.config.feature_size)
    wish = CaptionOptions(beam_size=options.beam_size, captions=options.beam_size)
    size_px = ours.checkpoint.preprocessing.resize_px
    frames = np.random.default_rng(0).integers(0, 256, (1, FRAMES, size_px, size_px, 3), dtype=np.uint8)

    @torch.inference_mode()
    def loop(clips: int) -> list[list[Beam]]:
        limits = {"beam_size": options.beam_size, "max_words": options.max_words}
        return [search_by_loop(decoder, clip, **limits) for clip in features[:clips]]

    runs = {
        "one clip": lambda: ours.caption_features(features[:1], wish),
        f"{CLIPS} clips": lambda: ours.caption_features(features, wish),
        "one clip, loop": lambda: loop(1),
        f"{CLIPS} clips, loop": lambda: loop(CLIPS),
        "encoder, one clip": lambda: ours.features(frames),
    }
    equal = same(ours.caption_features(features, wish), loop(CLIPS), ours)
    times = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    medians = {name: statistics.median(of_rounds) for name, of_rounds in times.items()}
    for name, median in medians.items():
        print(f"{name:20} {1000 * median:8.1f} ms")
    encoder_s = medians["encoder, one clip"]
    conclude(
        "search",
        {
            "words": options.words,
            "max_words": options.max_words,
            "beam_size": options.beam_size,
            "median_ms": {name: round(1000 * median, 2) for name, median in medians.items()},
            "equal": equal,
            "share_of_encoder": medians["one clip"] / encoder_s,
            "share_of_encoder_16_clips": medians[f"{CLIPS} clips"] / (CLIPS * encoder_s),
            "speedup_over_loop": medians[f"{CLIPS} clips, loop"] / medians[f"{CLIPS} clips"],
            "speedup_over_loop_one_clip": medians["one clip, loop"] / medians["one clip"],
        },
        folder=options.out,
    )


if __name__ == "__main__":
    try:
        main()
    except EtenetError as error:
        print(f"search: {error}", file=sys.stderr)
        sys.exit(2)
