"""`python -m training.stills demo`: teach an encoder to name the thing and the scene in single frames.

It is to the demo's encoder what ImageNet is to the paper's: another task, learnt before captions. BatchNorm is trained
here and nowhere else: a deep network with random weights needs it, and has no statistics yet that could be frozen.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from etenet.errors import UsageError
from etenet.files import replacing, require_replaceable
from etenet.model.config import Preprocessing
from etenet.model.encoder import Encoder, feature_size
from etenet.model.preprocess import preprocess
from etenet.runtime.load import use_cores
from etenet.video.clip import FRAMES_PER_CLIP
from training import command
from training.data.datasets import Dataset, DatasetClip
from training.loop.loading import read_ahead
from training.loop.memory import keep_freed_memory
from training.progress import Progress, say
from training.recipes import RECIPES, overridden
from training.run_settings import Recipe, Stills

ATTRIBUTES = ("thing", "scene")

Draw = tuple[NDArray[np.int64], list[int], bool]  # numbers of clips, a frame of each, whether all are mirrored
Batch = tuple[Tensor, dict[str, Tensor], bool]  # frames uint8, their labels by attribute, whether all are mirrored


class StillsClassifier(nn.Module):
    """An encoder with one linear classifier per attribute."""

    def __init__(self, encoder: Encoder, classes: Mapping[str, int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder.network.requires_grad_()
        size = feature_size(encoder.name)
        self.heads = nn.ModuleDict({name: nn.Linear(size, count) for name, count in classes.items()})

    def train(self, mode: bool = True) -> StillsClassifier:
        """Unlike `Encoder.train`, this also trains BatchNorm."""
        super().train(mode)
        self.encoder.network.train(mode)
        return self

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        features = self.encoder(frames)
        return {name: head(features) for name, head in self.heads.items()}


def teach(dataset: Dataset, recipe: Recipe, device: torch.device) -> Encoder:
    """Train on single frames of the training clips, and report the share of validation frames named correctly."""
    if (stills := recipe.stills) is None:
        raise UsageError("this recipe starts from ImageNet; choose one that has stills, such as demo")
    dataset.need_labels()
    torch.manual_seed(recipe.seed)
    preprocessing, names = recipe.preprocessing(), _names(dataset)
    dataset.need_size(preprocessing.resize_px)
    model = StillsClassifier(Encoder(recipe.encoder), {attribute: len(values) for attribute, values in names.items()})
    model = model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=stills.learning_rate, weight_decay=stills.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, stills.learning_rate, total_steps=stills.steps, pct_start=0.1
    )
    draws = _draws(np.random.default_rng(recipe.seed), stills, len(dataset.clips["train"]))
    read = partial(_read, dataset, names, pinned=device.type == "cuda")
    with (
        Progress("stills", stills.steps, "step") as progress,
        closing(read_ahead(read, draws)) as batches,
    ):
        for step, batch in enumerate(batches, start=1):
            loss = _loss(model, batch, preprocessing, device)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update(1)
            if step % stills.report_every == 0 or step == stills.steps:
                shares = _accuracy(model, dataset, preprocessing, names, device)
                report = ", ".join(f"{attribute} {share:.1%}" for attribute, share in shares.items())
                say(f"stills, step {step}: loss {loss.item():.3f}; correct on validation frames: {report}")
    return model.encoder.cpu()


def _names(dataset: Dataset) -> dict[str, list[str]]:
    """All values of each attribute, over all splits."""
    every = [clip for clips in dataset.clips.values() for clip in clips]
    return {attribute: sorted({clip.labels[attribute] for clip in every}) for attribute in ATTRIBUTES}


def _draws(rng: np.random.Generator, stills: Stills, clips: int) -> Iterator[Draw]:
    """One frame from each of many clips: frames of one clip are too similar for one batch."""
    for _ in range(stills.steps):
        chosen = rng.integers(clips, size=stills.batch)
        yield chosen, [int(rng.integers(FRAMES_PER_CLIP)) for _ in chosen], bool(rng.random() < 0.5)


def _read(dataset: Dataset, names: Mapping[str, Sequence[str]], draw: Draw, *, pinned: bool) -> Batch:
    chosen, moments, mirrored = draw
    clips = [dataset.clips["train"][number] for number in chosen]
    frames = dataset.stills_of(clips, moments, pinned=pinned)
    labels = {attribute: _labels(clips, attribute, values) for attribute, values in names.items()}
    return frames, {name: ids.pin_memory() if pinned else ids for name, ids in labels.items()}, mirrored


def _labels(clips: Sequence[DatasetClip], attribute: str, names: Sequence[str]) -> Tensor:
    return torch.tensor([names.index(clip.labels[attribute]) for clip in clips])


def _loss(model: StillsClassifier, batch: Batch, preprocessing: Preprocessing, device: torch.device) -> Tensor:
    pixels, labels, mirrored = batch
    frames = preprocess(pixels.to(device, non_blocking=True), preprocessing)
    frames = (frames.flip(-1) if mirrored else frames).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16):
        scores = model(frames)
    losses = [
        nn.functional.cross_entropy(scores[name].float(), labels[name].to(device, non_blocking=True))
        for name in ATTRIBUTES
    ]
    return torch.stack(losses).sum()


@torch.no_grad()
def _accuracy(
    model: StillsClassifier,
    dataset: Dataset,
    preprocessing: Preprocessing,
    names: Mapping[str, Sequence[str]],
    device: torch.device,
) -> dict[str, float]:
    """The share of validation frames that are named correctly, by attribute, with BatchNorm frozen."""
    clips, hits = dataset.clips["validation"], dict.fromkeys(ATTRIBUTES, 0)
    model.eval()
    for clip in clips:
        frames = preprocess(dataset.frames_of([clip]).to(device), preprocessing).flatten(0, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            scores = model(frames)
        for attribute in ATTRIBUTES:
            right = _labels([clip], attribute, names[attribute]).to(device)
            hits[attribute] += int((scores[attribute].argmax(-1) == right).sum())
    model.train()
    return {attribute: count / (len(clips) * FRAMES_PER_CLIP) for attribute, count in hits.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.stills", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="made by training.prepare")
    parser.add_argument("--out", type=Path, required=True, metavar="F.pt", help="the encoder's weights")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change the recipe")
    options = parser.parse_args(arguments)
    require_replaceable(options.out)
    keep_freed_memory()
    use_cores()
    recipe = overridden(RECIPES[options.recipe](), "stills", options.set)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = teach(Dataset.load(options.data), recipe, device)
    body = io.BytesIO()
    torch.save(encoder.state_dict(), body)
    with replacing(options.out) as file:
        file.write(body.getbuffer())


if __name__ == "__main__":
    command.run(main)
