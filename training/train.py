"""`python -m training.train RECIPE --stage 1|2|3`: train captions in the stages of arXiv 1904.02628, and on a reward.

Stage 1 trains the decoder on the features of a frozen encoder, computed once. Stage 2 starts from the best checkpoint
of stage 1 and trains everything; BatchNorm stays frozen. Stage 3, which is not in the paper, starts from the best of
stage 2, or of stage 1, and trains the decoder on the CIDEr-D of sentences that it draws (arXiv 1612.00563).

For several processes or GPUs, start it with `torchrun --nproc-per-node N -m training.train`. SIGTERM saves and ends
with status 0, Ctrl-C with 130; `--resume` continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from etenet.errors import UsageError
from etenet.model.checkpoint import Checkpoint
from training import command
from training.data.datasets import Dataset
from training.data.mixture import data_source, load_all
from training.loop.memory import keep_freed_memory, out_of_memory_named
from training.loop.processes import init_processes
from training.loop.run_log import locked
from training.loop.stage import Interrupted, Run, train_stage
from training.loop.start import continued, first_checkpoint, next_checkpoint, stage_before, with_settings
from training.recipes import RECIPES, overridden
from training.run_settings import Recipe


def _start(recipe: Recipe, dataset: Dataset, options: argparse.Namespace) -> tuple[Recipe, Checkpoint]:
    """The checkpoint that the stage starts from, and the recipe for it."""
    if options.stage == 1 and options.start is None:
        return recipe, first_checkpoint(recipe, dataset, options.encoder_weights)
    if options.encoder_weights:
        raise UsageError("--encoder-weights is for a new network in stage 1; this one starts from a checkpoint")
    if recipe.stages[options.stage].encoder_learning_rate and not dataset.has_frames:
        raise UsageError(
            f"{dataset.folder} holds features, not frames: there is no encoder to train in stage {options.stage}"
        )
    start = next_checkpoint(options.start or stage_before(options.out, options.stage), dataset)
    recipe = continued(recipe, start, options.set)
    return recipe, with_settings(start, recipe)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument(
        "--data",
        type=data_source,
        action="append",
        required=True,
        metavar="DIR[=WEIGHT]",
        help="made by training.prepare; repeat it to train on several, validated on the first",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="stage N writes RUN/stageN/")
    parser.add_argument("--encoder-weights", type=Path, metavar="F", help="for stage 1; default: ImageNet's")
    parser.add_argument(
        "--from", type=Path, dest="start", metavar="F.pt", help="start from it; default: the best of the stage before"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1; default: a GPU if there is one")
    parser.add_argument("--resume", action="store_true", help="continue where the run stopped, if there is one")
    parser.add_argument(
        "--save-every-s",
        type=float,
        default=300.0,
        metavar="S",
        help="seconds from one snapshot to the next; default 300",
    )
    parser.add_argument("--tensorboard", action="store_true", help="write for TensorBoard, if it is installed")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change the recipe")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    options = _parser().parse_args(arguments)
    keep_freed_memory()
    recipe = overridden(RECIPES[options.recipe](), options.stage, options.set)
    dataset = load_all(options.data)
    with init_processes(options.device) as processes:
        try:
            with out_of_memory_named(recipe.stages[options.stage]):
                recipe, start = _start(recipe, dataset, options)
                dataset.need_size(start.preprocessing.resize_px)
            run = Run(
                recipe=recipe,
                recipe_name=options.recipe,
                stage_number=options.stage,
                dataset=dataset,
                folder=options.out / f"stage{options.stage}",
                processes=processes,
                resume=options.resume,
                save_every_s=options.save_every_s,
                tensorboard=options.tensorboard,
            )
            with locked(run.folder) if processes.first else nullcontext():
                best = train_stage(run, start)
        except Interrupted as interrupted:
            print(f"training: {interrupted}; continue with --resume", file=sys.stderr)
            return command.CTRL_C if processes.ctrl_c.is_set() else 0
        if processes.first:
            print(best)
    return 0


if __name__ == "__main__":
    command.run(main)
