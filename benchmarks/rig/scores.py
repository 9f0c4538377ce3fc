"""How well a checkpoint describes the test split of the demo world, captioned by the serving code."""

from __future__ import annotations

from pathlib import Path

import etenet
from etenet.scoring.scores import Scorer
from training.data.datasets import Dataset
from training.evaluate import demo_accuracy
from training.evaluation.captioning import caption_split


def demo_scores(checkpoint: Path, dataset: Dataset, scorer: Scorer, *, device: str = "cpu") -> dict[str, float]:
    """Scores in points (100 = 1.0), and the percentage of clips of which an attribute is named right."""
    captions = caption_split(etenet.load(checkpoint, device=device), dataset, "test")
    scores = scorer.score({video: [caption] for video, caption in captions.items()}).overall
    right = demo_accuracy(dataset.clips["test"], captions)
    return {name: 100 * value for name, value in scores.items()} | {
        f"{attribute} right %": 100 * share for attribute, share in right.items()
    }
