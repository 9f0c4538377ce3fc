"""The second half of `benchmarks.training`: a full-size checkpoint of the demo world, and its scores on unseen clips.

Runs the commands that users run, with the recipe `demo-full` and one process per GPU: render clips, teach the encoder
to name what stills show, train both stages. Then the serving code captions the test split with this checkpoint and
with the small demo model.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rig.record import REPOSITORY
from benchmarks.rig.scores import split_scores
from etenet.errors import EtenetError
from etenet.scoring.scores import Scorer
from training.data.datasets import Dataset

DEMO = REPOSITORY / "model_store" / "demo.pt"
RECIPE = "demo-full"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Arguments of each command beside the recipe, and the number of training processes without a GPU."""

    prepare: tuple[str, ...] = ("--encoder", "inceptionresnetv2", "--train-per-combination", "3")
    stills: tuple[str, ...] = ()
    stage_1: tuple[str, ...] = ()
    stage_2: tuple[str, ...] = ()
    processes: int = 1


def miniature() -> Plan:
    """A small network on a handful of clips, and two processes if there is no GPU."""
    small = ["encoder=squeezenet1_1", "crop_px=64"]
    stage = _set(*small, "epochs=1", "epoch_of=clips", "batch_clips=2", "captions_per_clip=1")
    return Plan(
        prepare=("--resize-px", "67", "--train-per-combination", "1", "--clips-per-split", "4"),
        stills=_set(*small, "steps=1", "batch=4"),
        stage_1=stage,
        stage_2=stage,
        processes=2,
    )


def _set(*settings: str) -> tuple[str, ...]:
    return tuple(word for setting in settings for word in ("--set", setting))


def train(plan: Plan, folder: Path, device: torch.device, *, keep: Path | None = None) -> dict[str, Any]:
    """Make the checkpoint in `folder`. Returns the seconds of each part, and both models' scores on the test split."""
    processes = torch.cuda.device_count() if device.type == "cuda" else plan.processes
    data, run, weights = folder / "data", folder / "run", folder / "encoder.pt"
    stage = ["training.train", RECIPE, "--data", str(data), "--out", str(run), "--stage"]
    commands = {
        "prepare": ["training.prepare", "demo", "--out", str(data), *plan.prepare],
        "stills": ["training.stills", RECIPE, "--data", str(data), "--out", str(weights), *plan.stills],
        "stage 1": [*_torchrun(processes), *stage, "1", "--encoder-weights", str(weights), *plan.stage_1],
        "stage 2": [*_torchrun(processes), *stage, "2", *plan.stage_2],
    }
    seconds = {part: _run(part, command) for part, command in commands.items()}
    best = run / "stage2" / "best.pt"
    started, dataset = time.monotonic(), Dataset.load(data)
    references = {clip.video: clip.captions for clip in dataset.clips["test"]}
    scorer = Scorer(
        references, tokenizer="none", meteor=False
    )  # the captions are normalised already, and Java may be missing
    scores = {
        name: split_scores(checkpoint, dataset, scorer, device=str(device))
        for name, checkpoint in (("full size", best), ("small demo", DEMO))
    }
    seconds["evaluate"] = time.monotonic() - started
    for name, of_model in scores.items():
        print(f"{name}:", "  ".join(f"{figure} {value:.1f}" for figure, value in of_model.items()), flush=True)
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(best, keep / f"{RECIPE}.pt")
    return {
        "processes": processes,
        "clips": {split: len(clips) for split, clips in dataset.clips.items()},
        "seconds": seconds,
        "test": scores,
        "epochs": [*_speed(run / "stage1"), *_speed(run / "stage2")],
    }


def _torchrun(processes: int) -> list[str]:
    """The words before a module's name with which so many processes run it."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return torchrun if processes > 1 else []


def _run(part: str, command: Sequence[str]) -> float:
    """Run a command; returns its seconds. Its output is dropped: stdout is for the figures."""
    started = time.monotonic()
    ended = subprocess.run([sys.executable, "-m", *command], cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=False)
    if ended.returncode:
        raise EtenetError(f"{part} ended with status {ended.returncode}: python -m {' '.join(command)}")
    seconds = time.monotonic() - started
    print(f"{part}: {seconds:.1f} s", flush=True)
    return seconds


def _speed(stage: Path) -> list[dict[str, Any]]:
    """Clips per second, the time spent waiting for data, and the peak memory of each epoch."""
    return [json.loads(line) for line in (stage / "speed.jsonl").read_text().splitlines()]
