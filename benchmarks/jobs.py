"""`python -m benchmarks.jobs`: clips per second of each engine of batch jobs, beside decoding alone and encoding alone.

With Ray, starting counts. In this process and on the server, the network is loaded before the clock starts.
"""

from __future__ import annotations

import argparse
import struct
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import wait
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.rig import command, servers
from benchmarks.rig.clips import drifting
from benchmarks.rig.untrained import numbered_words
from etenet.captioning.options import CaptionOptions
from etenet.jobs import inputs
from etenet.jobs.engines import local, ray, server
from etenet.jobs.run import Engine
from etenet.model import checkpoint as checkpoints
from etenet.runtime import CPU_BATCH_CLIPS
from etenet.sandbox.pool import Sandbox
from etenet.video.limits import DecodeLimits


def different(clip: bytes, count: int, folder: Path) -> list[inputs.JobClip]:
    """Files with the same pictures. A box at the end differs, so that no cached caption is used."""
    for number in range(count):
        (folder / f"{number:04}.mp4").write_bytes(clip + struct.pack(">I4sI", 12, b"free", number))
    return inputs.clips([str(folder)])


def alone(checkpoint: Path, clips: Sequence[inputs.JobClip]) -> tuple[float, float]:
    """Clips per second of decoding on all cores, and of encoding in full batches."""
    bodies = [Path(clip.path).read_bytes() for clip in clips]
    captioner = local.load(checkpoint, limits=DecodeLimits(), clips=local.WORTH_COMPILING_CLIPS)
    decoders = Sandbox(resize_px=captioner.checkpoint.preprocessing.resize_px)
    started = time.perf_counter()
    decoded = [decoders.submit(body) for body in bodies]
    wait(decoded)
    decode_s = time.perf_counter() - started
    decoders.close()
    frames = np.stack([future.result()[0].frames for future in decoded[:CPU_BATCH_CLIPS]])
    captioner.network.features(frames)
    started = time.perf_counter()
    for _ in range(len(clips) // CPU_BATCH_CLIPS):
        captioner.network.features(frames)
    encode_s = time.perf_counter() - started
    return len(clips) / decode_s, len(clips) // CPU_BATCH_CLIPS * CPU_BATCH_CLIPS / encode_s


def rate(engine: Engine, clips: Sequence[inputs.JobClip]) -> tuple[float, float]:
    """Clips per second from the first clip taken to the last record, and seconds to the first record."""
    started, moments = time.perf_counter(), []
    for record in engine(clips, lambda *_: None):
        if "error" in record:
            raise RuntimeError(f"{record['video']}: {record['error']['message']}")
        moments.append(time.perf_counter() - started)
    return len(moments) / moments[-1], moments[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jobs", description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="inceptionresnetv2")
    parser.add_argument("--crop-px", type=int)
    parser.add_argument("--words", type=int, default=12_000)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip")
    parser.add_argument("--size", default="426x240", metavar="WxH")
    options, results = command.start(parser, arguments)
    width, height = map(int, options.size.split("x"))
    words, caption_options = numbered_words(options.words), CaptionOptions()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        checkpoint, folder = Path(scratch) / "untrained.pt", Path(scratch) / "clips"
        folder.mkdir()
        clip = drifting(options.seconds, width, height)
        clips = different(clip, options.clips, folder)
        checkpoints.save(checkpoints.initialise(options.encoder, words, crop_px=options.crop_px), checkpoint)
        decode, encode = alone(checkpoint, clips)
        rates = {"here": rate(local.engine(checkpoint, caption_options, details=False, clips=len(clips)), clips)}
        url = stack.enter_context(servers.ours(checkpoint, clip)).url
        for number in (1, 2, server.IN_FLIGHT):
            engine = server.engine(url, caption_options, details=False, in_flight=number)
            rates[f"server, {number} in flight"] = rate(engine, clips)
        stack.close()
        for number in (1, 2):
            engine = ray.engine(checkpoint, caption_options, details=False, actors=number)
            rates[f"ray, {number} actors"] = rate(engine, clips)
    print(f"{'decoding alone':22} {decode:8.3f} clips/s")
    print(f"{'encoding alone':22} {encode:8.3f} clips/s")
    for name, (per_s, first_s) in rates.items():
        print(f"{name:22} {per_s:8.3f} clips/s, the first after {first_s:5.1f} s")
    results.conclude(
        "jobs",
        {
            "encoder": options.encoder,
            "clips": options.clips,
            "decode_per_s": round(decode, 3),
            "encode_per_s": round(encode, 3),
            "per_s": {name: round(per_s, 3) for name, (per_s, _) in rates.items()},
            "first_after_s": {name: round(first_s, 1) for name, (_, first_s) in rates.items()},
            "share_of_the_slower": rates["here"][0] / min(decode, encode),
        },
    )


if __name__ == "__main__":
    command.run("jobs", main)
