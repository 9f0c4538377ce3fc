"""`python -m benchmarks.jobs`: clips per second of each engine of batch jobs, beside decoding alone and encoding alone.

The engines take turns, `--rounds` times. The first batch tells what starting takes, the others how fast an engine is
after that. In this process and on the server, the network is loaded before the clock starts.
"""

from __future__ import annotations

import argparse
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from ray.cluster_utils import Cluster

from benchmarks.rig import command, servers
from benchmarks.rig.clips import drifting
from benchmarks.rig.untrained import numbered_words
from etenet.captioning.options import CaptionOptions
from etenet.jobs import inputs
from etenet.jobs.engines import local, ray, server
from etenet.jobs.run import Engine
from etenet.linux import cores
from etenet.model import checkpoint as checkpoints
from etenet.runtime import CPU_BATCH_CLIPS
from etenet.sandbox.pool import Sandbox
from etenet.video.limits import DecodeLimits
from training.recipes import real


def different(clip: bytes, count: int, folder: Path) -> list[inputs.JobClip]:
    """Files with the same pictures. A box at the end differs, so that no cached caption is used."""
    for number in range(count):
        (folder / f"{number:04}.mp4").write_bytes(clip + struct.pack(">I4sI", 12, b"free", number))
    return inputs.clips([str(folder)])


def alone(checkpoint: Path, clips: Sequence[inputs.JobClip]) -> tuple[float, float]:
    """Clips per second of decoding on all cores, and of encoding in full batches."""
    bodies = [Path(clip.path).read_bytes() for clip in clips]
    captioner = local.load(checkpoint, limits=DecodeLimits(), clips=local.WORTH_CAPTURING_CLIPS)
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


@dataclass(frozen=True, slots=True)
class Speed:
    """`per_s` counts the start, from the first clip taken; `running_per_s` does not. Each clip of the first batch is
    ready with the last one.
    """

    per_s: float
    running_per_s: float
    first_s: float
    start_s: float

    @classmethod
    def of(cls, engine: Engine, clips: Sequence[inputs.JobClip]) -> Speed:
        started, moments = time.perf_counter(), []
        for record in engine(clips, lambda *_: None):
            if "error" in record:
                raise RuntimeError(f"{record['video']}: {record['error']['message']}")
            moments.append(time.perf_counter() - started)
        running_per_s = (len(moments) - CPU_BATCH_CLIPS) / (moments[-1] - moments[CPU_BATCH_CLIPS - 1])
        return cls(
            per_s=len(moments) / moments[-1],
            running_per_s=running_per_s,
            first_s=moments[0],
            start_s=moments[CPU_BATCH_CLIPS - 1] - CPU_BATCH_CLIPS / running_per_s,
        )


@contextmanager
def two_nodes() -> Iterator[str]:
    """The address of a Ray cluster of two nodes on this machine, each with half its cores."""
    half = max(1, cores() // 2)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": half})
    try:
        cluster.add_node(num_cpus=half)
        yield cluster.address
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jobs", description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default=real().encoder, help="default: that of real.pt")
    parser.add_argument("--crop-px", type=int)
    parser.add_argument("--words", type=int, default=12_000)
    parser.add_argument("--clips", type=int, default=240)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip")
    parser.add_argument("--size", default="426x240", metavar="WxH")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-server", dest="server", action="store_false", help="leave out the server")
    options, results = command.start(parser, arguments)
    width, height = map(int, options.size.split("x"))
    words, caption_options = numbered_words(options.words), CaptionOptions()
    speeds: dict[str, list[Speed]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, folder = Path(scratch) / "untrained.pt", Path(scratch) / "clips"
        folder.mkdir()
        clip = drifting(options.seconds, width, height)
        clips = different(clip, options.clips, folder)
        checkpoints.save(checkpoints.initialise(options.encoder, words, crop_px=options.crop_px), checkpoint)
        decode, encode = alone(checkpoint, clips)

        def measure(name: str, engine: Callable[[], Engine]) -> None:
            speed = Speed.of(engine(), clips)
            print(f"{name:22} {speed}", flush=True)
            speeds.setdefault(name, []).append(speed)

        for _ in range(options.rounds):
            measure("here", partial(local.engine, checkpoint, caption_options, details=False, clips=len(clips)))
            measure("ray", partial(ray.engine, checkpoint, caption_options, details=False))
            with two_nodes() as address:
                measure(
                    "ray, two nodes", partial(ray.engine, checkpoint, caption_options, details=False, address=address)
                )
            if options.server:
                with servers.ours(checkpoint, clip) as running:
                    for number in (1, 2, server.IN_FLIGHT):
                        measure(
                            f"server, {number} in flight",
                            partial(server.engine, running.url, caption_options, details=False, in_flight=number),
                        )
    print(f"{'decoding alone':22} {decode:8.3f} clips/s")
    print(f"{'encoding alone':22} {encode:8.3f} clips/s")
    here = speeds["here"]
    of_here = {
        name: median(one.running_per_s / other.running_per_s for one, other in zip(of_engine, here, strict=True))
        for name, of_engine in speeds.items()
    }

    def medians(figure: str) -> dict[str, float]:
        return {name: round(median(getattr(one, figure) for one in of), 3) for name, of in speeds.items()}

    for name, share in of_here.items():
        print(f"{name:22} {medians('per_s')[name]:8.3f} clips/s, after its start {share:.3f} of this process")
    results.conclude(
        "jobs",
        {
            "encoder": options.encoder,
            "clips": options.clips,
            "decode_per_s": round(decode, 3),
            "encode_per_s": round(encode, 3),
            "rounds": options.rounds,
            "per_s": medians("per_s"),
            "first_after_s": medians("first_s"),
            "start_s": medians("start_s"),
            "running_per_s": medians("running_per_s"),
            "running_of_here": {name: round(share, 3) for name, share in of_here.items()},
            "share_of_the_slower": medians("per_s")["here"] / min(decode, encode),
        },
    )


if __name__ == "__main__":
    command.run("jobs", main)
