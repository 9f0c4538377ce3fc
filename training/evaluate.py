"""`python -m training.evaluate`: caption the clips of a split with exactly the serving code, and score the captions.

Writes `captions.jsonl`, `metrics.json` and `report.html` (the best and the worst clips) into the folder asked for and
prints the metrics. Where clips carry labels (the demo world), a caption is right about an attribute if it names the
clip's own value and no other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import etenet
from etenet.errors import EtenetError, UsageError
from etenet.scoring.scores import Scores, score
from training.data.datasets import Clip, Dataset
from training.demo import world
from training.report import Example, html

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
                    raise UsageError(f"{dataset.clip_file(clip)}: {outcome}") from outcome
                captions[clip.video] = outcome.text
            bar.update(len(batch))
    return captions


def demo_accuracy(clips: Sequence[Clip], captions: Mapping[str, str]) -> dict[str, float]:
    """Share of clips whose caption is right about each attribute, and about all three."""
    right = {"thing": 0, "motion": 0, "scene": 0, "all": 0}
    for clip in clips:
        said = world.named(captions[clip.video])
        hits = [attribute for attribute in clip.labels if getattr(said, attribute) == clip.labels[attribute]]
        for attribute in hits:
            right[attribute] += 1
        right["all"] += len(hits) == len(clip.labels)
    return {attribute: count / len(clips) for attribute, count in right.items()}


def report(dataset: Dataset, clips: Sequence[Clip], captions: Mapping[str, str], scores: Scores, title: str) -> str:
    """A page with the figures and the clips of highest and lowest CIDEr."""
    examples = [
        Example(
            video=clip.video,
            frames=dataset.frames[clip.row],
            caption=captions[clip.video],
            references=clip.captions,
            scores=scores.per_clip[clip.video],
        )
        for clip in clips
    ]
    return html(title, scores.overall, examples)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="F.pt")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--split", default="test")
    parser.add_argument("--tokenizer", choices=("ptb", "none"), default="ptb", help="none: captions come normalised")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="of torch, such as cuda; default: cpu")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN")
    options = parser.parse_args(arguments)
    captioner, dataset = etenet.load(options.checkpoint, device=options.device), Dataset.load(options.data)
    captions = caption_split(captioner, dataset, options.split)
    clips = dataset.clips[options.split]
    scores = score(
        {video: [caption] for video, caption in captions.items()},
        {clip.video: clip.captions for clip in clips},
        tokenizer=options.tokenizer,
    )
    metrics: dict[str, Any] = {
        "checkpoint": captioner.checkpoint_id,
        "split": options.split,
        "clips": len(clips),
        "tokenizer": options.tokenizer,
        "scores": scores.overall,
    }
    if all(clip.labels for clip in clips):
        metrics["right"] = demo_accuracy(clips, captions)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "captions.jsonl").open("w", encoding="utf-8") as file:
        for video, caption in captions.items():
            file.write(json.dumps({"video": video, "caption": caption}, ensure_ascii=False) + "\n")
    (options.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    title = f"{options.split}: {options.checkpoint}"
    (options.out / "report.html").write_text(report(dataset, clips, captions, scores, title), encoding="utf-8")
    print(json.dumps(metrics))


if __name__ == "__main__":
    try:
        main()
    except EtenetError as error:
        print(f"training: {error}", file=sys.stderr)
        sys.exit(2)
