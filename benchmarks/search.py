"""`python -m benchmarks.search`: beam search over a large vocabulary, beside a plain loop over beams and the encoder.

The loop takes one beam and one word at a time, as most published code does. Both must find the same sentences.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers.plain import Beam, search_by_loop
from benchmarks.rig import command
from benchmarks.rig.timing import medians_s
from benchmarks.rig.untrained import of_full_length
from etenet.captioning.captioner import Captioner, decoders_for
from etenet.captioning.captions import Sentence
from etenet.captioning.options import CaptionOptions
from etenet.runtime.openvino import CompiledEncoder, OpenVinoNetwork, compile_encoder
from etenet.video.clip import FRAMES_PER_CLIP

CLIPS = 16


def captioner(encoder: str, words: int, max_words: int) -> Captioner:
    checkpoint = of_full_length(encoder, words, max_words)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "encoder.xml"
        compile_encoder(checkpoint, graph)
        network = OpenVinoNetwork(checkpoint, CompiledEncoder(graph, threads=torch.get_num_threads()))
    return Captioner(checkpoint, network, decoders_for(checkpoint, sandboxed=False))


def same(captions: Sequence[Sequence[Sentence]], looped: Sequence[Sequence[Beam]], captioner: Captioner) -> bool:
    """Whether both found the same sentences, with the same log-probabilities."""
    tokens = captioner.checkpoint.vocabulary.tokens
    return all(
        sentence.words == tuple(tokens(beam.words[:-1]))
        and math.isclose(sentence.log_prob, beam.log_prob, rel_tol=1e-4)
        for sentences, beams in zip(captions, looped, strict=True)
        for sentence, beam in zip(sentences, beams, strict=True)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="inceptionresnetv2")
    parser.add_argument("--words", type=int, default=12_000)
    parser.add_argument("--max-words", type=int, default=20)
    parser.add_argument("--beam-size", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    options, results = command.start(parser, arguments)
    ours = captioner(options.encoder, options.words, options.max_words)
    decoder = ours.checkpoint.model.decoder
    features = torch.randn(CLIPS, FRAMES_PER_CLIP, decoder.config.feature_size)
    caption_options = CaptionOptions(beam_size=options.beam_size, captions=options.beam_size)
    size_px = ours.checkpoint.preprocessing.resize_px
    frames = np.random.default_rng(0).integers(0, 256, (1, FRAMES_PER_CLIP, size_px, size_px, 3), dtype=np.uint8)

    @torch.inference_mode()
    def loop(clips: int) -> list[list[Beam]]:
        limits = {"beam_size": options.beam_size, "max_words": options.max_words}
        return [search_by_loop(decoder, clip, **limits) for clip in features[:clips]]

    runs: dict[str, Callable[[], object]] = {
        "one clip": lambda: ours.caption_features(features[:1], caption_options),
        f"{CLIPS} clips": lambda: ours.caption_features(features, caption_options),
        "one clip, loop": lambda: loop(1),
        f"{CLIPS} clips, loop": lambda: loop(CLIPS),
        "encoder, one clip": lambda: ours.network.features(frames),
    }
    equal = same(ours.caption_features(features, caption_options), loop(CLIPS), ours)
    medians = medians_s(runs, options.rounds)
    for name, median in medians.items():
        print(f"{name:20} {1000 * median:8.1f} ms")
    encoder_s = medians["encoder, one clip"]
    results.conclude(
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
    )


if __name__ == "__main__":
    command.run("search", main)
