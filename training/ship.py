"""`python -m training.ship`: the best checkpoint of stage 2 -> `model_store/demo.pt`, its test scores, and `examples/`.

The checkpoint is stored in half precision and loaded again, so the scores are those of the file that ships.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

import etenet
from etenet.errors import EtenetError
from etenet.model import checkpoint as checkpoints
from training import command
from training.data.datasets import Dataset, DatasetClip
from training.demo import world
from training.evaluate import demo_accuracy
from training.evaluation.captioning import caption_split

REPOSITORY = Path(__file__).parent.parent
MAX_CHECKPOINT_BYTES = 12_000_000
MAX_EXAMPLE_BYTES = 300_000


def ship(run: Path, dataset: Dataset, checkpoint: Path, examples: Path) -> dict[str, object]:
    """Write the checkpoint and the examples, and return the test scores."""
    checkpoints.save(checkpoints.load(run / "stage2" / "best.pt"), checkpoint, dtype=torch.float16)
    if (size := checkpoint.stat().st_size) > MAX_CHECKPOINT_BYTES:
        raise EtenetError(f"{checkpoint} has {size} bytes, more than {MAX_CHECKPOINT_BYTES}")
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
    return {"clips": len(captions), "right": demo_accuracy(dataset.clips["test"], captions), "bytes": size}


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
    parser.add_argument("--run", type=Path, required=True, metavar="RUN")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--checkpoint", type=Path, default=REPOSITORY / "model_store" / "demo.pt", metavar="F.pt")
    parser.add_argument("--examples", type=Path, default=REPOSITORY / "examples", metavar="DIR")
    options = parser.parse_args(arguments)
    print(json.dumps(ship(options.run, Dataset.load(options.data), options.checkpoint, options.examples)))


if __name__ == "__main__":
    command.run(main)
