"""How well a checkpoint describes the test split of a data set, captioned by the serving code."""

from __future__ import annotations

from pathlib import Path

from etenet.scoring.scores import Scorer
from training.data.datasets import Dataset
from training.evaluate import demo_accuracy
from training.evaluation.captioning import caption_split, load_captioner


def split_scores(checkpoint: Path, dataset: Dataset, scorer: Scorer, *, device: str = "cpu") -> dict[str, float]:
    """Scores in points (100 = 1.0). Of the demo world also the percentage of clips with an attribute named right."""
    clips = dataset.need("test")
    captions = caption_split(load_captioner(checkpoint, dataset, device=device, clips=len(clips)), dataset, "test")
    scores = scorer.score({video: [caption] for video, caption in captions.items()}).overall
    points = {name: 100 * value for name, value in scores.items()}
    if all(clip.labels for clip in clips):
        points |= {f"{name} right %": 100 * share for name, share in demo_accuracy(clips, captions).items()}
    return points
