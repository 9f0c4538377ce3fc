"""`python -m training.evaluate`: caption the clips of a split with exactly the serving code and count what is right.

Writes `captions.jsonl` and `metrics.json` into the run folder and prints the metrics. For the demo world a caption
is right about an attribute if it names the clip's own value and no other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

import etenet
from etenet.errors import EtenetError, UsageError
from training import demo_world
from training.datasets import Clip, Dataset

BATCH_CLIPS = 8


def caption_split(captioner: etenet.Captioner, dataset: Dataset, split: str) -> dict[str, str]:
    """video -> caption; a clip that cannot be captioned raises its error."""
    clips, captions = dataset.clips.get(split, []), {}
    if not clips:
        raise UsageError(f"{dataset.folder} has no {split} split; it has {', '.join(dataset.clips)}")
    with tqdm(total=len(clips), unit="clip", disable=None) as bar:
        for start in range(0, len(clips), BATCH_CLIPS):
            batch = clips[start : start + BATCH_CLIPS]
            bodies = [dataset.clip_file(clip).read_bytes() for clip in batch]
            for clip, outcome in zip(
                batch, captioner.caption_batch(bodies, [etenet.CaptionOptions()] * len(batch)), strict=True
            ):
                if isinstance(outcome, etenet.CaptionError):
                    raise outcome
                captions[clip.video] = outcome.text
            bar.update(len(batch))
    return captions


def demo_accuracy(clips: Sequence[Clip], captions: dict[str, str]) -> dict[str, float]:
    """Share of clips whose caption is right about each attribute, and about all three."""
    right = {"thing": 0, "motion": 0, "scene": 0, "all": 0}
    for clip in clips:
        said = demo_world.named(captions[clip.video])
        hits = [attribute for attribute in clip.labels if getattr(said, attribute) == clip.labels[attribute]]
        for attribute in hits:
            right[attribute] += 1
        right["all"] += len(hits) == len(clip.labels)
    return {attribute: count / len(clips) for attribute, count in right.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="F.pt")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN")
    options = parser.parse_args(arguments)
    captioner, dataset = etenet.load(options.checkpoint), Dataset.load(options.data)
    captions = caption_split(captioner, dataset, options.split)
    clips = dataset.clips[options.split]
    metrics = {
        "checkpoint": captioner.checkpoint_id,
        "split": options.split,
        "clips": len(clips),
        "right": demo_accuracy(clips, captions),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "captions.jsonl").open("w") as file:
        for video, caption in captions.items():
            file.write(json.dumps({"video": video, "caption": caption}) + "\n")
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics))


if __name__ == "__main__":
    try:
        main()
    except EtenetError as error:
        sys.exit(f"training: {error}")
