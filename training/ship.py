"""`python -m training.ship`: the best checkpoint of a run -> `model_store/`, in half precision.

With --data, the demo world's, it also writes `examples/` and prints the scores on the test split. They are those of the
file that ships, which is loaded again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import etenet
from etenet.errors import EtenetError, UsageError
from etenet.model import checkpoint as checkpoints
from etenet.model.checkpoint import Checkpoint
from training import command
from training.data.datasets import Dataset, DatasetClip
from training.demo import world
from training.evaluate import demo_accuracy
from training.evaluation.captioning import caption_split
from training.loop.start import stage_before

LAST_STAGE = 3
MAX_CHECKPOINT_BYTES = 12_000_000
MAX_EXAMPLE_BYTES = 300_000


def ship(run: Path, checkpoint: Path, *, max_bytes: int, terms: str, start_share: float = 0.0) -> int:
    """Write the best checkpoint of the last stage of a run in half precision, and return the size of the file.

    Raises `EtenetError` if that is more than `max_bytes`. The file that shipped before is then unchanged.
    """
    best_file, start_file = (stage_before(run, number) for number in (LAST_STAGE + 1, LAST_STAGE))
    best = checkpoints.load(best_file)
    if start_share:
        if best_file == start_file:
            raise UsageError(
                f"{run} has no stage{LAST_STAGE}/best.pt to mix its start into; train stage {LAST_STAGE}, or leave out "
                "--start-share"
            )
        best = mixed(best, checkpoints.load(start_file), start_share)
    candidate = checkpoint.with_name(f".{checkpoint.name}.candidate")
    try:
        checkpoints.save(replace(best, name=checkpoint.stem, terms=terms), candidate, dtype=torch.float16)
        if (size := candidate.stat().st_size) > max_bytes:
            raise EtenetError(
                f"{checkpoint} would have {size} bytes, more than {max_bytes}; raise --max-bytes, or train a smaller "
                "encoder"
            )
        os.replace(candidate, checkpoint)
    finally:
        candidate.unlink(missing_ok=True)
    return size


def mixed(best: Checkpoint, start: Checkpoint, share: float) -> Checkpoint:
    """`best` with its weights moved by this share towards those that its stage started from.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", arXiv 2109.01903. What a stage learned for its
    reward stays, and less of what it forgot is lost.
    """
    weights = {
        name: torch.lerp(value, start_value, share) if value.is_floating_point() else value
        for (name, value), start_value in zip(
            best.model.state_dict().items(), start.model.state_dict().values(), strict=True
        )
    }
    best.model.load_state_dict(weights)
    return replace(best, provenance={**best.provenance, "start_share": share})


def ship_examples(checkpoint: Path, dataset: Dataset, examples: Path) -> dict[str, object]:
    """Write examples out of the test split of the demo world, and return the scores of that split."""
    captions = caption_split(etenet.load(checkpoint), dataset, "test")
    chosen = choose_examples(dataset, captions)
    examples.mkdir(parents=True, exist_ok=True)
    for old in examples.glob("*.mp4"):
        old.unlink()
    listed = {}
    for clip in chosen:
        name = "-".join(clip.labels.values()).replace(" ", "-") + ".mp4"
        shutil.copyfile(dataset.clip_file(clip), examples / name)
        listed[name] = captions[clip.video]
    (examples / "captions.json").write_text(json.dumps(listed, indent=2) + "\n")
    return {"clips": len(captions), "right": demo_accuracy(dataset.clips["test"], captions)}


def choose_examples(dataset: Dataset, captions: dict[str, str]) -> list[DatasetClip]:
    """One correctly captioned test clip per motion. No two have a thing or a scene in common."""
    chosen: list[DatasetClip] = []
    for clip in dataset.clips["test"]:
        taken = {value for other in chosen for value in other.labels.values()}
        small = dataset.clip_file(clip).stat().st_size < MAX_EXAMPLE_BYTES
        right = world.named(captions[clip.video]) == world.Combination(**clip.labels)
        if small and right and not taken & set(clip.labels.values()):
            chosen.append(clip)
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.ship", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="the folder with stage1 and so on")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("model_store/demo.pt"),
        metavar="F.pt",
        help="the file to write; default: model_store/demo.pt, which is replaced",
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=MAX_CHECKPOINT_BYTES,
        metavar="N",
        help=f"how many bytes the checkpoint may have; default {MAX_CHECKPOINT_BYTES}",
    )
    parser.add_argument("--terms", default="", metavar="TEXT", help="terms under which the weights may be used")
    parser.add_argument(
        "--start-share", type=float, default=0.0, metavar="S", help="mix in the weights that stage 3 began with"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="dataset folder of the demo world: choose examples there, too"
    )
    parser.add_argument(
        "--examples",
        type=Path,
        default=Path("examples"),
        metavar="DIR",
        help="where --data puts them, in place of the clips there; default: examples",
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.start_share < 1:
        raise UsageError(f"--start-share must be from 0 to 1, 1 excluded, got {options.start_share}")
    dataset = Dataset.load(options.data) if options.data else None
    if dataset:
        dataset.need_labels()
    size = ship(
        options.run,
        options.checkpoint,
        max_bytes=options.max_bytes,
        terms=options.terms,
        start_share=options.start_share,
    )
    shipped: dict[str, object] = {"bytes": size}
    if dataset:
        shipped |= ship_examples(options.checkpoint, dataset, options.examples)
    print(json.dumps(shipped))


if __name__ == "__main__":
    command.run(main)
