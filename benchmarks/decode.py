"""`python -m benchmarks.decode`: bytes -> 16 frames of 314 x 314 in one and two threads, beside torchcodec and Pillow.

torchcodec seeks exactly, or by its index of key frames. The third contender decodes every frame and resizes with
Pillow, in one thread. All read the same clips in turn, in one process. Clips of different kinds are reported apart,
because what can be left out differs.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation
from numpy.typing import NDArray
from PIL import Image

from benchmarks.rig import command
from benchmarks.rig.timing import Cost, cost, timed_s
from etenet.assets import MOVING_CLIP
from etenet.errors import CaptionError, UsageError
from etenet.video.ffmpeg import LENIENT_METADATA
from etenet.video.limits import DecodeLimits
from etenet.video.sampling import middle_of_slices, sample_frames
from etenet.video.sharing import Helpers

SIZE_PX = 314
NO_DEADLINE = DecodeLimits(decode_cpu_s=3600, decode_deadline_s=7200)

THREADS = (1, 2)
SLOW_FPS = 2.5
NO_B_FRAMES, SLOW, OTHERS = "no B-frames", "1 to 2 frames per second", "others"

Frames = NDArray[np.uint8]
Contender = Callable[[bytes], Frames]


class Entrant(NamedTuple):
    """A contender with a number of threads."""

    name: str
    threads: int

    def __str__(self) -> str:
        return f"{self.name}, {self.threads} thread{'s' * (self.threads > 1)}"


def ours(threads: int = 1) -> Contender:
    helpers = Helpers(ThreadPoolExecutor(threads - 1), threads - 1) if threads > 1 else None

    def read(body: bytes) -> Frames:
        return sample_frames(body, resize_px=SIZE_PX, limits=NO_DEADLINE, helpers=helpers).frames

    return read


def torchcodec(seek_mode: Literal["exact", "approximate"], threads: int, *, own_resize: bool) -> Contender:
    """torchcodec's frames, resized to 314 x 314 by FFmpeg's filter inside torchcodec, or by torch afterwards."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    def read(body: bytes) -> Frames:
        transforms = [Resize((SIZE_PX, SIZE_PX))] if own_resize else None
        decoder = VideoDecoder(body, seek_mode=seek_mode, num_ffmpeg_threads=threads, transforms=transforms)
        frames = decoder.get_frames_at(middle_of_slices(len(decoder))).data
        if not own_resize:
            shape = (SIZE_PX, SIZE_PX)
            frames = torch.nn.functional.interpolate(frames.float(), shape, mode="bilinear", antialias=True).byte()
        pixels: Frames = frames.permute(0, 2, 3, 1).numpy()
        return pixels

    return read


def everything_then_pillow(body: bytes) -> Frames:
    with av.open(io.BytesIO(body), **LENIENT_METADATA) as container:
        container.streams.video[0].thread_count = 1
        frames = [frame.to_image() for frame in container.decode(video=0)]
    chosen = [frames[number] for number in middle_of_slices(len(frames))]
    return np.stack([np.asarray(frame.resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)) for frame in chosen])


def contenders() -> dict[Entrant, Contender]:
    always = {Entrant("ours", threads): ours(threads) for threads in THREADS}
    always[Entrant("everything, then Pillow", 1)] = everything_then_pillow
    modes: tuple[Literal["exact", "approximate"], ...] = ("exact", "approximate")
    try:
        theirs = {
            Entrant(f"torchcodec {mode}{', its own resize' if own else ''}", threads): torchcodec(
                mode, threads, own_resize=own
            )
            for mode in modes
            for own in (False, True)
            for threads in THREADS
        }
        for read in theirs.values():
            read(MOVING_CLIP.read_bytes())  # torchcodec looks for FFmpeg when it first needs it
    except RuntimeError:
        print("decode: torchcodec is left out: it finds no FFmpeg (apt install ffmpeg)", file=sys.stderr)
        return always
    return always | theirs


def kind_of(body: bytes) -> str:
    """How much of the clip can be left out: all packets without B-frames depend on each other."""
    with av.open(io.BytesIO(body), **LENIENT_METADATA) as container:
        frames = [(frame.time or 0.0, frame.pict_type) for frame in container.decode(video=0)]
    times_s = sorted(time_s for time_s, _ in frames)
    if (len(frames) - 1) < SLOW_FPS * (times_s[-1] - times_s[0]):
        return SLOW
    return OTHERS if av.video.frame.PictureType.B in {kind for _, kind in frames} else NO_B_FRAMES


def full_decode(body: bytes) -> Frames:
    """The 16 frames by definition: every frame is decoded, the middles of 16 equal slices are resized as ours are."""
    with av.open(io.BytesIO(body), **LENIENT_METADATA) as container:
        container.streams.video[0].thread_count = 1
        count = sum(1 for _ in container.decode(video=0))
        container.seek(0)
        chosen, frames = middle_of_slices(count), {}
        for number, frame in enumerate(container.decode(video=0)):
            if number in chosen:
                small = frame.reformat(SIZE_PX, SIZE_PX, "rgb24", interpolation=Interpolation.BILINEAR)
                frames[number] = small.to_ndarray()
    return np.stack([frames[number] for number in chosen])


def full_decode_once(body: bytes) -> Frames:
    """Every frame is decoded once, and 16 are resized. The number of frames is the container's."""
    with av.open(io.BytesIO(body), **LENIENT_METADATA) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        chosen, frames = set(middle_of_slices(stream.frames)), []
        for number, frame in enumerate(container.decode(stream)):
            if number in chosen:
                frames.append(frame.reformat(SIZE_PX, SIZE_PX, "rgb24", interpolation=Interpolation.BILINEAR))
    return np.stack([frame.to_ndarray() for frame in frames])


def readable(paths: Sequence[Path], readers: Mapping[Entrant, Contender]) -> list[Path]:
    """The clips that every contender can read. The others are named on stderr."""
    good = []
    for path in paths:
        body, failed = path.read_bytes(), {}
        for name, read in readers.items():
            try:
                read(body)
            except (CaptionError, av.FFmpegError, RuntimeError, IndexError, ValueError) as error:
                failed[name] = str(error).splitlines()[0]
        good += [] if failed else [path]
        for name, reason in failed.items():
            print(f"decode: {path.name} left out: {name}: {reason}", file=sys.stderr)
    return good


def measured(
    paths: Sequence[Path], readers: Mapping[Entrant, Contender], rounds: int
) -> dict[Path, dict[Entrant, Cost]]:
    """The cost of each contender for each clip: medians of `rounds`, each in another order of the contenders."""
    order, costs = random.Random(0), {}
    for path in paths:
        body = path.read_bytes()
        of_rounds: dict[Entrant, list[Cost]] = {entrant: [] for entrant in readers}
        for _ in range(rounds):
            for entrant in order.sample(list(readers), len(readers)):
                of_rounds[entrant].append(cost(partial(readers[entrant], body)))
        costs[path] = {entrant: _medians(of_entrant) for entrant, of_entrant in of_rounds.items()}
    return costs


def _medians(costs: Iterable[Cost]) -> Cost:
    return Cost(*(statistics.median(seconds) for seconds in zip(*costs, strict=True)))


def summary(costs: Sequence[Mapping[Entrant, Cost]]) -> dict[str, Any]:
    """Of some clips: medians of wall and processor time in ms, and ratios of them, for each number of threads."""
    of = {entrant: _medians(each[entrant] for each in costs) for entrant in costs[0]}
    figures: dict[str, Any] = {"clips": len(costs)}
    for threads in THREADS:
        same = {entrant.name: of[entrant] for entrant in of if entrant.threads == threads}
        theirs = [cost for name, cost in same.items() if name.startswith("torchcodec")]
        figures["one_thread" if threads == 1 else "two_threads"] = {
            "median_ms": {name: round(1000 * cost.wall_s, 2) for name, cost in same.items()},
            "median_cpu_ms": {name: round(1000 * cost.cpu_s, 2) for name, cost in same.items()},
            "ratio_to_torchcodec": same["ours"].wall_s / min(cost.wall_s for cost in theirs) if theirs else None,
        }
    one, two = (of[Entrant("ours", threads)] for threads in THREADS)
    figures["two_threads"] |= {"ratio_to_one": two.wall_s / one.wall_s, "cpu_ratio_to_one": two.cpu_s / one.cpu_s}
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__.splitlines()[0])
    reference = os.environ.get("ETENET_REFERENCE_DATA")
    default = [Path(reference) / name for name in ("msvd/clips", "msrvtt/clips")] if reference else None
    parser.add_argument("--clips", type=Path, nargs="+", default=default, metavar="DIR")
    parser.add_argument("--long", type=Path, metavar="F", help="a clip of minutes, to compare with decoding all of it")
    parser.add_argument("--rounds", type=int, default=5)
    options, results = command.start(parser, arguments)
    if not options.clips:
        raise UsageError("name folders of clips with --clips, or set ETENET_REFERENCE_DATA")
    long = options.long or (Path(reference) / "odd_clips" / "long_1080p_lowbitrate.mp4" if reference else None)
    torch.set_num_threads(1)
    readers = contenders()
    paths = readable(sorted(path for folder in options.clips for path in folder.iterdir()), readers)
    equal = all(
        np.array_equal(readers[Entrant("ours", threads)](path.read_bytes()), full_decode(path.read_bytes()))
        for path in paths
        for threads in THREADS
    )
    kinds = {path: kind_of(path.read_bytes()) for path in paths}
    costs = measured(paths, readers, options.rounds)
    figures = summary(list(costs.values()))
    one, two = figures["one_thread"], figures["two_threads"]
    for name, median_ms in one["median_ms"].items():
        print(f"{name:40} {median_ms:7.1f} ms, two threads {two['median_ms'].get(name, math.nan):7.1f} ms")
    by_kind = {kind: summary([costs[path] for path in paths if kinds[path] == kind]) for kind in set(kinds.values())}
    for kind, of_kind in by_kind.items():
        print(f"{kind}: {of_kind['clips']} clips, {of_kind['one_thread']['ratio_to_torchcodec']} of torchcodec's best")
    figures |= {
        "median_ms": one["median_ms"],
        "ratio_to_torchcodec": one["ratio_to_torchcodec"],
        "ratio_to_decode_all": one["median_ms"]["ours"] / one["median_ms"]["everything, then Pillow"],
        "by_kind": by_kind,
        "frames_equal": equal,
    }
    if long:
        body = long.read_bytes()
        of_long = {
            name: statistics.median(timed_s(partial(read, body)) for _ in range(3))
            for name, read in (("ours", readers[Entrant("ours", 1)]), ("full decode", full_decode_once))
        }
        print(f"{long.name}: {of_long['ours']:.2f} s, all of it {of_long['full decode']:.2f} s")
        figures["long_ratio_to_decode_all"] = of_long["ours"] / of_long["full decode"]
    results.conclude("decode", figures)


if __name__ == "__main__":
    command.run("decode", main)
