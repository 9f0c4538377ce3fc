"""`python -m benchmarks.scale`: how time and memory grow with workers, clip length, frame size and vocabulary.

Clips are rendered here. Workers and memory are measured on a server with 8 clients that send clips of the largest frame
size in --sizes.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import torch

from benchmarks.rig import command, servers
from benchmarks.rig.clips import drifting
from benchmarks.rig.load import closed_loop, throughput_per_s
from benchmarks.rig.timing import median_ms
from benchmarks.rig.untrained import numbered_words, of_full_length
from etenet.captioning.captioner import Captioner, decoders_for
from etenet.captioning.options import CaptionOptions
from etenet.model import checkpoint as checkpoints
from etenet.runtime.network import TorchNetwork
from etenet.serving import archive
from etenet.video import sampling
from etenet.video.clip import FRAMES_PER_CLIP

LENGTHS_S = (10, 30, 60, 180, 360)
LENGTHS_AT = (640, 360)
SIZES = {"240p": (426, 240), "480p": (854, 480), "720p": (1280, 720), "1080p": (1920, 1080), "4K": (3840, 2160)}
SIZES_AT_S = 10
VOCABULARIES = (1_000, 12_000, 50_000, 200_000)
MAX_WORDS = 20
CLIENTS = 8
MIB = 2**20
MARKS = {"worker": "model_service_worker", "decoder": "etenet.sandbox"}  # in the command line of a process


def decode_ms(clip: bytes, size_px: int, rounds: int) -> float:
    return round(median_ms(lambda: sampling.sample_frames(clip, resize_px=size_px), rounds), 1)


def search_ms(encoder: str, words: int, rounds: int) -> dict[str, float]:
    """One clip and eight, with a beam of 5. Every sentence has the full length."""
    checkpoint = of_full_length(encoder, words, MAX_WORDS)
    captioner = Captioner(checkpoint, TorchNetwork(checkpoint), decoders_for(checkpoint, sandboxed=False))
    features = torch.randn(8, FRAMES_PER_CLIP, checkpoint.model.decoder.config.feature_size)

    def search(clips: int) -> object:
        return captioner.caption_features(features[:clips], CaptionOptions())

    return {str(clips): round(median_ms(partial(search, clips), rounds), 1) for clips in (1, 8)}


@contextmanager
def peaks_mib(every_s: float = 0.05) -> Iterator[dict[str, float]]:
    """The most memory that a worker and a decoder process of the servers started here had."""
    peaks, done = {"worker": 0.0, "decoder": 0.0}, threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    command = " ".join(process.cmdline())
                    for kind in (kind for kind, mark in MARKS.items() if mark in command):
                        peaks[kind] = max(peaks[kind], round(process.memory_info().rss / MIB, 1))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        done.set()
        watcher.join()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="inceptionresnetv2")
    parser.add_argument("--crop-px", type=int)
    parser.add_argument("--words", type=int, default=12_000)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--lengths-s", type=int, nargs="+", default=LENGTHS_S)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=tuple(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=90.0, help="of load by 8 clients, for each number of workers")
    options, results = command.start(parser, arguments)
    start = checkpoints.initialise(options.encoder, numbered_words(options.words), crop_px=options.crop_px)
    resize_px = start.preprocessing.resize_px
    by_length, by_size, by_words, by_workers = {}, {}, {}, {}
    for length_s in options.lengths_s:
        by_length[length_s] = decode_ms(drifting(length_s, *LENGTHS_AT), resize_px, options.rounds)
        print(f"{length_s:5} s of {LENGTHS_AT[0]} x {LENGTHS_AT[1]}: decoded in {by_length[length_s]} ms", flush=True)
    for size in options.sizes:
        largest = drifting(SIZES_AT_S, *SIZES[size])
        by_size[size] = decode_ms(largest, resize_px, options.rounds)
        print(f"{SIZES_AT_S:5} s of {size}: decoded in {by_size[size]} ms", flush=True)
    for words in options.vocabularies:
        by_words[words] = search_ms(options.encoder, words, options.rounds)
        print(f"{words:7} words: searched in {by_words[words]} ms", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(start, Path(folder) / "untrained.pt")
        mar = archive.package(Path(folder) / "untrained.pt", Path(folder) / "etenet.mar")
        for workers in (1, 2):
            with (
                servers.ours_with(mar, largest, minWorkers=workers, maxWorkers=workers) as ours,
                peaks_mib() as peaks,
            ):
                arrivals = asyncio.run(closed_loop(ours.url, [largest], clients=CLIENTS, seconds=options.seconds))
            by_workers[workers] = {"clips_per_s": round(throughput_per_s(arrivals), 3), "peak_mib": peaks}
            print(f"{workers} workers, {CLIENTS} clients: {by_workers[workers]}", flush=True)
    results.conclude(
        "scale",
        {
            "encoder": options.encoder,
            "decode_ms_by_length_s": by_length,
            "decode_ms_by_size": by_size,
            "search_ms_by_words": by_words,
            "workers": by_workers,
            "workers_clip": f"{SIZES_AT_S} s of {size}",
        },
    )


if __name__ == "__main__":
    command.run("scale", main)
