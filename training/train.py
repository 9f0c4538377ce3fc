"""`python -m training.train RECIPE --stage 1|2`: teach captions, in the two stages of arXiv 1904.02628, section 3.3.

Stage 1 trains the decoder on the features of a frozen encoder, computed once. Stage 2 starts from the best of
stage 1 and trains everything; BatchNorm stays frozen. A run folder holds `best.pt` (lowest validation loss) and
`log.jsonl` (one object per epoch).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from etenet import checkpoint as checkpoints
from etenet.checkpoint import Checkpoint
from etenet.errors import EtenetError, UsageError
from etenet.preprocess import preprocess
from training.datasets import Clip, Dataset, Sentences, draw_captions, shuffled_batches
from training.loss import mean_loss, sentence_losses
from training.memory import keep_freed_memory
from training.recipes import RECIPES, Recipe, Stage

FeaturesOf = Callable[[Sequence[Clip]], Tensor]  # clips -> (B, L, D)


@dataclass(frozen=True, slots=True)
class Run:
    """All that a stage needs."""

    dataset: Dataset
    stage: Stage
    stage_number: int
    seed: int
    out: Path


def first_checkpoint(recipe: Recipe, dataset: Dataset, encoder_weights: Path | None) -> Checkpoint:
    """What stage 1 starts from: a new decoder on an encoder with the given weights, or ImageNet's."""
    torch.manual_seed(recipe.seed)
    checkpoint = checkpoints.initialise(
        recipe.encoder,
        dataset.vocabulary(),
        crop_px=recipe.crop_px,
        max_words=recipe.max_words,
        dropout=recipe.dropout,
        pretrained_encoder=encoder_weights is None,
    )
    if encoder_weights is not None:
        if not encoder_weights.is_file():
            raise UsageError(f"no encoder weights at {encoder_weights}; make them with python -m training.stills")
        checkpoint.model.encoder.load_state_dict(torch.load(encoder_weights, weights_only=True))
    return checkpoint


def train(run: Run, checkpoint: Checkpoint) -> Path:
    """Train one stage and return the path of its best checkpoint."""
    model, stage = checkpoint.model.to(memory_format=torch.channels_last), run.stage
    model.decoder.requires_grad_(True)
    model.encoder.requires_grad_(stage.encoder_learning_rate > 0)
    features_of = _learned(run, checkpoint) if stage.encoder_learning_rate else _cached(run, checkpoint)
    optimizer = torch.optim.Adam(_parameter_groups(model, stage))
    clips = run.dataset.clips["train"]
    steps = stage.epochs * math.ceil(len(clips) / (stage.batch_clips * stage.accumulation_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate_share(steps, stage))
    best_path, best_loss = run.out / "best.pt", math.inf
    run.out.mkdir(parents=True, exist_ok=True)
    for epoch in range(stage.epochs):
        started = time.monotonic()
        model.train()
        train_loss = _epoch(run, checkpoint, features_of, optimizer, schedule, epoch)
        model.eval()
        validation_loss = _validation_loss(run, checkpoint, features_of)
        line = {
            "stage": run.stage_number,
            "epoch": epoch + 1,
            "train_loss": train_loss,
            "validation_loss": validation_loss,
            "seconds": time.monotonic() - started,
        }
        with (run.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), file=sys.stderr, flush=True)
        if validation_loss < best_loss:
            best_loss = validation_loss
            checkpoints.save(checkpoint, best_path)
    return best_path


def _parameter_groups(model: nn.Module, stage: Stage) -> list[dict[str, object]]:
    groups = [("decoder", stage.decoder_learning_rate, stage.decoder_weight_decay)]
    if stage.encoder_learning_rate:
        groups.append(("encoder", stage.encoder_learning_rate, stage.encoder_weight_decay))
    return [
        {
            "params": [p for p in model.get_submodule(part).parameters() if p.requires_grad],
            "lr": rate,
            "weight_decay": decay,
        }
        for part, rate, decay in groups
    ]


def _learning_rate_share(steps: int, stage: Stage) -> Callable[[int], float]:
    def share(step: int) -> float:
        half_cosine = (1 + math.cos(math.pi * min(1.0, step / steps))) / 2
        fallen = stage.final_learning_rate_share + (1 - stage.final_learning_rate_share) * half_cosine
        return fallen * min(1.0, (step + 1) / (stage.warmup_steps + 1))

    return share


def _learned(run: Run, checkpoint: Checkpoint) -> FeaturesOf:
    """Features through the encoder, with gradients where they are on; bf16 inside, float32 out."""

    def features_of(clips: Sequence[Clip]) -> Tensor:
        frames = preprocess(run.dataset.frames_of(clips), checkpoint.preprocessing)
        with torch.autocast(frames.device.type, torch.bfloat16):
            return checkpoint.model.encode(frames).float()

    return features_of


def _cached(run: Run, checkpoint: Checkpoint) -> FeaturesOf:
    """Features of the frozen encoder, computed once for every clip."""
    compute, every = _learned(run, checkpoint), [clip for split in run.dataset.clips.values() for clip in split]
    features: dict[int, Tensor] = {}
    checkpoint.model.eval()
    with torch.no_grad(), tqdm(total=len(every), desc="features", unit="clip", disable=None) as bar:
        for start in range(0, len(every), run.stage.batch_clips):
            batch = every[start : start + run.stage.batch_clips]
            features.update(zip((clip.row for clip in batch), compute(batch), strict=True))
            bar.update(len(batch))
    return lambda clips: torch.stack([features[clip.row] for clip in clips])


def _losses(run: Run, checkpoint: Checkpoint, features: Tensor, captions: Sequence[Sequence[str]]) -> Tensor:
    sentences = Sentences.encode(captions, checkpoint.vocabulary, checkpoint.max_words)
    return sentence_losses(checkpoint.model.decoder, features, sentences, attention_penalty=run.stage.attention_penalty)


def _epoch(
    run: Run,
    checkpoint: Checkpoint,
    features_of: FeaturesOf,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    epoch: int,
) -> float:
    stage, clips = run.stage, run.dataset.clips["train"]
    rng, total = np.random.default_rng([run.seed, run.stage_number, epoch]), 0.0
    effective = stage.batch_clips * stage.accumulation_steps
    with tqdm(total=len(clips), desc=f"stage {run.stage_number} epoch {epoch + 1}", unit="clip", disable=None) as bar:
        for window in shuffled_batches(clips, effective, seed=run.seed + run.stage_number, epoch=epoch):
            optimizer.zero_grad()
            for start in range(0, len(window), stage.batch_clips):
                batch = window[start : start + stage.batch_clips]
                captions = draw_captions(batch, stage.captions_per_clip, rng)
                losses = _losses(run, checkpoint, features_of(batch), captions)
                loss = mean_loss(losses, len(window) * stage.captions_per_clip)
                if not torch.isfinite(loss):
                    raise UsageError(f"the loss is {loss.item()} in epoch {epoch + 1}; lower the learning rate")
                loss.backward()
                total += losses.sum().item()
            nn.utils.clip_grad_value_(checkpoint.model.parameters(), stage.gradient_clip_value)
            optimizer.step()
            schedule.step()
            bar.update(len(window))
            bar.set_postfix(loss=f"{losses.mean().item():.2f}")
    return total / (len(clips) * stage.captions_per_clip)


@torch.no_grad()
def _validation_loss(run: Run, checkpoint: Checkpoint, features_of: FeaturesOf) -> float:
    clips, total, count = run.dataset.clips["validation"], 0.0, 0
    for start in range(0, len(clips), run.stage.batch_clips):
        batch = clips[start : start + run.stage.batch_clips]
        fewest = min(len(clip.captions) for clip in batch)
        losses = _losses(run, checkpoint, features_of(batch), [clip.captions[:fewest] for clip in batch])
        total, count = total + losses.sum().item(), count + losses.numel()
    return total / count


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="stage N writes RUN/stageN/")
    parser.add_argument("--encoder-weights", type=Path, metavar="F.pt", help="stage 1; default: ImageNet's")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    recipe, dataset = RECIPES[options.recipe](), Dataset.load(options.data)
    if options.stage == 1:
        start = first_checkpoint(recipe, dataset, options.encoder_weights)
    else:
        start = checkpoints.load(options.out / "stage1" / "best.pt")
    run = Run(dataset, recipe.stages[options.stage], options.stage, recipe.seed, options.out / f"stage{options.stage}")
    print(train(run, start))


if __name__ == "__main__":
    try:
        main()
    except EtenetError as error:
        sys.exit(f"training: {error}")
