"""`python -m benchmarks.decode`: bytes -> 16 frames of 314 x 314 in one thread, beside torchcodec and Pillow.

torchcodec seeks exactly, or by its index of key frames. The third contender decodes every frame and resizes with
Pillow. All read the same clips in turn, in one process.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation
from numpy.typing import NDArray
from PIL import Image

from benchmarks.rig import command
from benchmarks.rig.timing import timed_s
from etenet.assets import MOVING_CLIP
from etenet.errors import CaptionError, UsageError
from etenet.video.ffmpeg import LENIENT_METADATA
from etenet.video.limits import DecodeLimits
from etenet.video.sampling import middle_of_slices, sample_frames

SIZE_PX = 314
NO_DEADLINE = DecodeLimits(decode_cpu_s=3600, decode_deadline_s=7200)

Frames = NDArray[np.uint8]
Contender = Callable[[bytes], Frames]


def ours(body: bytes) -> Frames:
    return sample_frames(body, resize_px=SIZE_PX, limits=NO_DEADLINE).frames


def torchcodec(seek_mode: Literal["exact", "approximate"], *, own_resize: bool) -> Contender:
    """torchcodec's frames, resized to 314 x 314 by FFmpeg's filter inside torchcodec, or by torch afterwards."""
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    def read(body: bytes) -> Frames:
        transforms = [Resize((SIZE_PX, SIZE_PX))] if own_resize else None
        decoder = VideoDecoder(body, seek_mode=seek_mode, num_ffmpeg_threads=1, transforms=transforms)
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


def contenders() -> dict[str, Contender]:
    always: dict[str, Contender] = {"ours": ours, "everything, then Pillow": everything_then_pillow}
    modes: tuple[Literal["exact", "approximate"], ...] = ("exact", "approximate")
    try:
        theirs = {
            f"torchcodec {mode}{', its own resize' if own else ''}": torchcodec(mode, own_resize=own)
            for mode in modes
            for own in (False, True)
        }
        for read in theirs.values():
            read(MOVING_CLIP.read_bytes())  # torchcodec looks for FFmpeg when it first needs it
    except RuntimeError:
        print("decode: torchcodec is left out: it finds no FFmpeg (apt install ffmpeg)", file=sys.stderr)
        return always
    return always | theirs


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


def readable(paths: Sequence[Path], readers: Mapping[str, Contender]) -> list[Path]:
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


def measured(paths: Sequence[Path], readers: Mapping[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender for each clip: the median of `rounds`, each in another order of the contenders."""
    order = random.Random(0)
    medians_s: dict[str, list[float]] = {name: [] for name in readers}
    for path in paths:
        body = path.read_bytes()
        times_s: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(rounds):
            for name in order.sample(list(readers), len(readers)):
                times_s[name].append(timed_s(partial(readers[name], body)))
        for name, of_rounds in times_s.items():
            medians_s[name].append(statistics.median(of_rounds))
    return medians_s


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
    equal = all(np.array_equal(ours(path.read_bytes()), full_decode(path.read_bytes())) for path in paths)
    times = measured(paths, readers, options.rounds)
    medians = {name: statistics.median(of_clips) for name, of_clips in times.items()}
    for name, median in medians.items():
        print(f"{name:40} {1000 * median:7.1f} ms")
    theirs = [median for name, median in medians.items() if name.startswith("torchcodec")]
    figures = {
        "clips": len(paths),
        "median_ms": {name: round(1000 * median, 2) for name, median in medians.items()},
        "ratio_to_torchcodec": medians["ours"] / min(theirs) if theirs else None,
        "ratio_to_decode_all": medians["ours"] / medians["everything, then Pillow"],
        "frames_equal": equal,
    }
    if long:
        body = long.read_bytes()
        of_long = {
            name: statistics.median(timed_s(partial(read, body)) for _ in range(3))
            for name, read in (("ours", ours), ("full decode", full_decode_once))
        }
        print(f"{long.name}: {of_long['ours']:.2f} s, all of it {of_long['full decode']:.2f} s")
        figures["long_ratio_to_decode_all"] = of_long["ours"] / of_long["full decode"]
    results.conclude("decode", figures)


if __name__ == "__main__":
    command.run("decode", main)
