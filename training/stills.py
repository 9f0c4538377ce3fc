"""`python -m training.stills demo`: teach an encoder to name the thing and the scene in single frames.

What ImageNet is to the paper's encoder, this is to the demo's: a different task, learnt before captions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from etenet.config import FRAMES_PER_CLIP
from etenet.encoder import Encoder, feature_size
from etenet.preprocess import preprocess
from training.datasets import Clip, Dataset
from training.memory import keep_freed_memory
from training.recipes import RECIPES, Recipe

ATTRIBUTES = ("thing", "scene")


class StillsClassifier(nn.Module):
    """An encoder with one linear classifier per attribute."""

    def __init__(self, encoder: Encoder, classes: dict[str, int]) -> None:
        super().__init__()
        self.encoder = encoder
        size = feature_size(encoder.name)
        self.heads = nn.ModuleDict({name: nn.Linear(size, count) for name, count in classes.items()})

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        features = self.encoder(frames)
        return {name: head(features) for name, head in self.heads.items()}


def teach(dataset: Dataset, recipe: Recipe) -> Encoder:
    """Train on single frames of the training clips; report the share named right on validation clips."""
    torch.manual_seed(recipe.seed)
    rng, stills, clips = np.random.default_rng(recipe.seed), recipe.stills, dataset.clips["train"]
    names = {a: sorted({clip.labels[a] for clip in clips}) for a in ATTRIBUTES}
    labels = {a: _labels(clips, a, names[a]) for a in ATTRIBUTES}
    model = StillsClassifier(Encoder(recipe.encoder), {a: len(names[a]) for a in ATTRIBUTES})
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=stills.learning_rate, weight_decay=stills.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, stills.learning_rate, total_steps=stills.steps, pct_start=0.1
    )
    with tqdm(total=stills.steps, desc="stills", unit="step", disable=None) as bar:
        for step in range(1, stills.steps + 1):
            # One frame from each of many clips: frames of one clip are too alike to learn from side by side.
            chosen = rng.integers(len(clips), size=stills.batch)
            pixels = [dataset.frames[clips[i].row, rng.integers(FRAMES_PER_CLIP)] for i in chosen]
            frames = preprocess(torch.from_numpy(np.stack(pixels)), recipe.preprocessing())
            if rng.random() < 0.5:
                frames = frames.flip(-1)
            with torch.autocast(frames.device.type, torch.bfloat16):
                scores = model(frames.contiguous(memory_format=torch.channels_last))
            loss = torch.stack(
                [nn.functional.cross_entropy(scores[a].float(), labels[a][chosen]) for a in ATTRIBUTES]
            ).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if step % stills.report_every == 0 or step == stills.steps:
                shares = _right(model, dataset, recipe, names)
                report = ", ".join(f"{attribute} {share:.1%}" for attribute, share in shares.items())
                print(f"step {step}: right on validation frames: {report}", file=sys.stderr, flush=True)
    return model.encoder


def _labels(clips: Sequence[Clip], attribute: str, names: Sequence[str]) -> Tensor:
    return torch.tensor([names.index(clip.labels[attribute]) for clip in clips])


@torch.no_grad()
def _right(model: StillsClassifier, dataset: Dataset, recipe: Recipe, names: dict[str, list[str]]) -> dict[str, float]:
    """Share of all validation frames that are named right, by attribute."""
    clips, hits = dataset.clips["validation"], dict.fromkeys(ATTRIBUTES, 0)
    model.eval()
    for clip in clips:
        scores = model(preprocess(dataset.frames_of([clip]), recipe.preprocessing()).flatten(0, 1))
        for attribute in ATTRIBUTES:
            hits[attribute] += int((scores[attribute].argmax(-1) == _labels([clip], attribute, names[attribute])).sum())
    model.train()
    return {attribute: count / (len(clips) * FRAMES_PER_CLIP) for attribute, count in hits.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.stills", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="F.pt", help="the encoder's weights")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    encoder = teach(Dataset.load(options.data), RECIPES[options.recipe]())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(encoder.state_dict(), options.out)


if __name__ == "__main__":
    main()
