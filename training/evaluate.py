"""`python -m training.evaluate`: caption the clips of a split with exactly the serving code, and score the captions.

Writes `captions.jsonl`, `metrics.json` and `report.html` (the best and the worst clips) into the folder given by --out
and prints the metrics. A data set of given features has no video files: its features go to the serving search, and the
report has no pictures. Where clips carry labels (the demo world), a caption is right about an attribute if it names
the clip's own value and no other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import etenet
from etenet.captioning.captioner import decoders_for
from etenet.errors import EtenetError, UsageError
from etenet.files import sha256
from etenet.model import checkpoint as checkpoints
from etenet.runtime import CPU_BATCH_CLIPS
from etenet.runtime.network import TorchNetwork
from etenet.scoring.scores import Scores, score
from training.data.datasets import Dataset, DatasetClip
from training.demo import world
from training.report import ReportedClip, html


def load_captioner(checkpoint: Path, dataset: Dataset, *, device: str = "cpu") -> etenet.Captioner:
    """A captioner for this data set: with an encoder for clips, without one for given features."""
    if dataset.features is None:
        return etenet.load(checkpoint, device=device)
    loaded, size = checkpoints.load(checkpoint, with_encoder=False), dataset.features.shape[-1]
    if (expected := loaded.model.decoder.config.feature_size) != size:
        raise UsageError(f"{checkpoint} takes features of size {expected}, those of {dataset.folder} have {size}")
    network = TorchNetwork(loaded, device=device)
    loaded = replace(loaded, id=f"sha256:{sha256(checkpoint)}")
    return etenet.Captioner(loaded, network, decoders_for(loaded, sandboxed=False))


def caption_split(captioner: etenet.Captioner, dataset: Dataset, split: str) -> dict[str, str]:
    """video -> caption. Raises `UsageError` for a clip that cannot be captioned."""
    clips = dataset.clips.get(split, [])
    captions: dict[str, str] = {}
    if not clips:
        raise UsageError(f"{dataset.folder} has no {split} split; it has {', '.join(dataset.clips)}")
    caption = _caption_clips if dataset.features is None else _caption_features
    with tqdm(total=len(clips), unit="clip", disable=None) as bar:
        for start in range(0, len(clips), CPU_BATCH_CLIPS):
            batch = clips[start : start + CPU_BATCH_CLIPS]
            captions |= zip((clip.video for clip in batch), caption(captioner, dataset, batch), strict=True)
            bar.update(len(batch))
    return captions


def _caption_clips(captioner: etenet.Captioner, dataset: Dataset, clips: Sequence[DatasetClip]) -> Iterator[str]:
    bodies = [dataset.clip_file(clip).read_bytes() for clip in clips]
    outcomes = captioner.caption_batch(bodies, [etenet.CaptionOptions()] * len(clips))
    for clip, outcome in zip(clips, outcomes, strict=True):
        if isinstance(outcome, etenet.CaptionError):
            raise UsageError(f"{dataset.clip_file(clip)}: {outcome}") from outcome
        assert isinstance(outcome, etenet.Caption)
        yield outcome.sentences[0].text


def _caption_features(captioner: etenet.Captioner, dataset: Dataset, clips: Sequence[DatasetClip]) -> Iterator[str]:
    assert dataset.features is not None
    features = torch.from_numpy(dataset.features[[clip.row for clip in clips]])
    for clip, sentences in zip(clips, captioner.caption_features(features, etenet.CaptionOptions()), strict=True):
        if not sentences:
            raise UsageError(f"the network has no finite probabilities for the features of {clip.video}")
        yield sentences[0].text


def demo_accuracy(clips: Sequence[DatasetClip], captions: Mapping[str, str]) -> dict[str, float]:
    """The share of clips whose caption is right about each attribute, and about all three."""
    right = {"thing": 0, "motion": 0, "scene": 0, "all": 0}
    for clip in clips:
        named = world.named(captions[clip.video])
        hits = [attribute for attribute in clip.labels if getattr(named, attribute) == clip.labels[attribute]]
        for attribute in hits:
            right[attribute] += 1
        right["all"] += len(hits) == len(clip.labels)
    return {attribute: count / len(clips) for attribute, count in right.items()}


def report(
    dataset: Dataset, clips: Sequence[DatasetClip], captions: Mapping[str, str], scores: Scores, title: str
) -> str:
    """A page with the scores and the clips of highest and lowest CIDEr."""
    reported = [
        ReportedClip(
            video=clip.video,
            frames=None if dataset.frames is None else dataset.frames[clip.row],
            caption=captions[clip.video],
            references=clip.captions,
            scores=scores.per_clip[clip.video],
        )
        for clip in clips
    ]
    return html(title, scores.overall, reported)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="F.pt")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--tokenizer", choices=("ptb", "none"), default="ptb", help="none: if references are normalised already"
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="a torch device, such as cuda; default: cpu")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN")
    options = parser.parse_args(arguments)
    dataset = Dataset.load(options.data)
    captioner = load_captioner(options.checkpoint, dataset, device=options.device)
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
