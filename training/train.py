"""`python -m training.train RECIPE --stage 1|2`: train captions in the two stages of arXiv 1904.02628, section 3.3.

Stage 1 trains the decoder on the features of a frozen encoder, computed once. Stage 2 starts from the best checkpoint
of stage 1 and trains everything; BatchNorm stays frozen. For several processes or GPUs, start it with
`torchrun --nproc-per-node N -m training.train`. SIGTERM saves and ends with status 0; `--resume` continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from etenet.errors import EtenetError, UsageError
from etenet.model import checkpoint as checkpoints
from etenet.model.checkpoint import Checkpoint
from etenet.model.config import DecoderConfig
from etenet.model.decoder import Decoder
from etenet.model.encoder import AbsentEncoder
from etenet.model.etenet import EtENet
from etenet.model.pretrained import load_encoder
from training.data.datasets import Dataset
from training.loop.memory import keep_freed_memory
from training.loop.processes import init_processes
from training.loop.stage import Interrupted, Run, train_stage
from training.recipes import RECIPES, Recipe, overridden


def first_checkpoint(recipe: Recipe, dataset: Dataset, encoder_weights: Path | None) -> Checkpoint:
    """Where stage 1 starts: a new decoder on an encoder with the given weights, or ImageNet's, or on given features."""
    torch.manual_seed(recipe.seed)
    if dataset.features is not None:
        vocabulary = dataset.vocabulary()
        sizes = DecoderConfig(
            feature_size=dataset.features.shape[-1], vocabulary_size=len(vocabulary), dropout=recipe.dropout
        )
        model = EtENet(AbsentEncoder(), Decoder(sizes))
        return Checkpoint(model, vocabulary, recipe.preprocessing(), recipe.max_words)
    return checkpoints.initialise(
        load_encoder(recipe.encoder, encoder_weights),
        dataset.vocabulary(),
        crop_px=recipe.crop_px,
        max_words=recipe.max_words,
        dropout=recipe.dropout,
    )


def _start(recipe: Recipe, stage: int, dataset: Dataset, options: argparse.Namespace) -> Checkpoint:
    if stage == 1:
        return first_checkpoint(recipe, dataset, options.encoder_weights)
    if dataset.features is not None:
        raise UsageError(f"{options.data} holds features, not frames: there is no encoder to train in stage 2")
    start = checkpoints.load(options.out / "stage1" / "best.pt")
    if start.vocabulary != dataset.vocabulary():
        raise UsageError(
            f"{options.out}/stage1 was not trained with the vocabulary of {options.data}; train stage 1 again"
        )
    return start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--stage", type=int, choices=(1, 2), required=True)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="made by training.prepare")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="stage N writes RUN/stageN/")
    parser.add_argument("--encoder-weights", type=Path, metavar="F", help="for stage 1; default: download ImageNet's")
    parser.add_argument("--resume", action="store_true", help="continue where the run stopped, if there is one")
    parser.add_argument("--save-every-s", type=float, default=300.0, metavar="S", help="from one snapshot to the next")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change the recipe")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    recipe = overridden(RECIPES[options.recipe](), options.stage, options.set)
    dataset = Dataset.load(options.data)
    with init_processes() as processes:
        run = Run(
            recipe=recipe,
            stage_number=options.stage,
            dataset=dataset,
            folder=options.out / f"stage{options.stage}",
            processes=processes,
            resume=options.resume,
            save_every_s=options.save_every_s,
        )
        try:
            best = train_stage(run, _start(recipe, options.stage, dataset, options))
        except Interrupted as interrupted:
            print(f"training: {interrupted}", file=sys.stderr)
            return
        if processes.first:
            print(best)


if __name__ == "__main__":
    try:
        main()
    except EtenetError as error:
        print(f"training: {error}", file=sys.stderr)
        sys.exit(2)
