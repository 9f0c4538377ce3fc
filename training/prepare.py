"""`python -m training.prepare demo`: clips and captions -> a dataset folder that `datasets.py` reads.

    manifest.jsonl     one object per clip: video, split, captions, labels
    frames.npy         (N, 16, resize_px, resize_px, 3) uint8, row i = line i of the manifest
    clips/             the clips themselves

Frames are picked by `etenet.video`, the code that serves.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from etenet.config import FRAMES_PER_CLIP
from etenet.video import SampledVideo, sample_frames
from training import demo_world
from training.recipes import demo


def prepare_demo(out: Path, *, resize_px: int, train_per_combination: int, seed: int = 0) -> None:
    """Render the demo world and cache its frames."""
    clips = list(demo_world.clips(train_per_combination=train_per_combination, seed=seed))
    (out / "clips").mkdir(parents=True, exist_ok=True)
    shape = (len(clips), FRAMES_PER_CLIP, resize_px, resize_px, 3)
    cache = np.lib.format.open_memmap(out / "frames.npy", mode="w+", dtype=np.uint8, shape=shape)
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        sampled = workers.map(partial(_render, folder=out / "clips", resize_px=resize_px), clips, chunksize=8)
        for row, video in enumerate(tqdm(sampled, total=len(clips), unit="clip", disable=None)):
            cache[row] = video.frames
    cache.flush()
    with (out / "manifest.jsonl").open("w") as manifest:
        for clip in clips:
            line = {
                "video": clip.name,
                "split": clip.split,
                "captions": demo_world.references(clip),
                "labels": asdict(clip.combination),
            }
            manifest.write(json.dumps(line) + "\n")
    print(f"{out}: {len(clips)} clips, frames at {resize_px} px", file=sys.stderr)


def _render(clip: demo_world.DemoClip, *, folder: Path, resize_px: int) -> SampledVideo:
    body = demo_world.render(clip)
    (folder / f"{clip.name}.mp4").write_bytes(body)
    return sample_frames(body, resize_px=resize_px)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.prepare", description=__doc__.splitlines()[0])
    datasets = parser.add_subparsers(dest="dataset", required=True)
    demo_parser = datasets.add_parser("demo", help="render the demo world")
    demo_parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    demo_parser.add_argument("--train-per-combination", type=int, default=4, metavar="N")
    options = parser.parse_args(arguments)
    prepare_demo(
        options.out,
        resize_px=demo().preprocessing().resize_px,
        train_per_combination=options.train_per_combination,
    )


if __name__ == "__main__":
    main()
